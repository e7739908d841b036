//! The layers a configuration is made of: file, environment, flags; later ones win.
//!
//! Upstairs:   `config::Config::load` reads the tables out of the merged tree.
//! Downstairs: `toml`, which also says on which line a key stands.
//!
//! Not here on purpose: no defaults (they stand with the settings), no reading of files, no
//! look at the process's own environment: both are handed in.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use super::problem::{ConfigProblem, Origin};
use super::tables::{DiskConfig, NamespaceConfig};
use super::{SINGLE_TABLES, TABLE_NAMES};

/// A value that somebody gave.
#[derive(Debug, Clone)]
pub(super) struct Given {
    pub(super) value: Written,
    pub(super) origin: Origin,
}

/// A value as it was written.
#[derive(Debug, Clone)]
pub(super) enum Written {
    /// In a file: it has a type.
    Toml(toml::Value),
    /// In a variable or flag: text whose type the setting decides.
    Text(String),
}

impl Given {
    /// The value as the setting's type, when it can be read so.
    pub(super) fn decode<T: DeserializeOwned>(&self) -> Option<T> {
        match &self.value {
            Written::Toml(value) => T::deserialize(value.clone()).ok(),
            Written::Text(text) => decode_text(text),
        }
    }

    /// The value as it was written.
    pub(super) fn text(&self) -> String {
        match &self.value {
            Written::Toml(value) => value.to_string(),
            Written::Text(text) => format!("{text:?}"),
        }
    }
}

/// Text of a variable or flag: itself, or a TOML value, or a list `a,b,c`.
fn decode_text<T: DeserializeOwned>(text: &str) -> Option<T> {
    let as_string = || T::deserialize(toml::Value::String(text.to_owned())).ok();
    let as_value = || T::deserialize(toml_value(text)?).ok();
    let as_list = || {
        let item = |item: &str| toml_value(item.trim());
        let items = text.split(',').map(item).collect::<Option<Vec<_>>>()?;
        T::deserialize(toml::Value::Array(items)).ok()
    };
    as_string().or_else(as_value).or_else(as_list)
}

fn toml_value(text: &str) -> Option<toml::Value> {
    let mut table: toml::Table = toml::from_str(&format!("value = {text}")).ok()?;
    (table.len() == 1).then(|| table.remove("value")).flatten()
}

/// Settings of one table by name.
pub(super) type Entries = BTreeMap<String, Given>;

/// Everything that was given, by table.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) single: BTreeMap<&'static str, Entries>,
    pub(super) disks: Vec<Entries>,
    /// What variables and flags said of every disk; one that comes later starts with it.
    every_disk: Entries,
    pub(super) namespaces: Vec<Entries>,
    pub(super) problems: Vec<ConfigProblem>,
}

impl Tree {
    /// Adds what a file says.
    pub(super) fn file(&mut self, path: &Path, text: &str) {
        let (lines, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            self.problems.push(ConfigProblem::Syntax {
                path: path.to_owned(),
                line: line_of(text, error.span().map_or(0, |span| span.start)),
                message: error.message().to_owned(),
            });
        }
        let Ok(values) = toml::from_str::<toml::Table>(text) else {
            return;
        };
        let source = Source { path, text };
        for (key, place) in lines.get_ref() {
            let name = key.get_ref().as_ref();
            let line = line_of(text, key.span().start);
            if let Some(value) = values.get(name) {
                self.file_table(source, line, name, value, place.get_ref());
            }
        }
    }

    fn file_table(
        &mut self,
        from: Source<'_>,
        line: usize,
        name: &str,
        value: &toml::Value,
        lines: &DeValue<'_>,
    ) {
        let origin = from.origin(line);
        let single = SINGLE_TABLES.iter().find(|(table, _)| *table == name);
        match (single, value.as_table(), list_of_tables(value)) {
            (Some((table, _)), Some(values), _) => {
                let entries = from.entries(values, lines.as_table());
                self.single.entry(table).or_default().extend(entries);
            }
            (None, _, Some(list)) if name == DiskConfig::TABLE => {
                self.disks.extend(from.list(&list, lines));
            }
            (None, _, Some(list)) if name == NamespaceConfig::TABLE => {
                self.namespaces.extend(from.list(&list, lines));
            }
            (single, ..) if single.is_some() || TABLE_NAMES.contains(&name) => {
                let head = single.map_or(format!("[[{name}]]"), |_| format!("[{name}]"));
                self.problems.push(ConfigProblem::Value {
                    origin,
                    key: name.to_owned(),
                    value: String::from(value.type_str()),
                    accepted: format!("settings below a line {head}"),
                });
            }
            _ => self.problems.push(ConfigProblem::Unknown {
                origin,
                name: name.to_owned(),
                accepted: TABLE_NAMES.join(", "),
            }),
        }
    }

    /// Adds one environment variable: `KVTIER_TABLE_SETTING`.
    pub(super) fn environment(&mut self, name: &str, text: &str) {
        let origin = Origin::Environment(name.to_owned());
        let lower = name.trim_start_matches("KVTIER_").to_ascii_lowercase();
        let parts = lower.split_once('_');
        let known = parts.and_then(|(table, setting)| {
            let names = settings_of(table)?;
            names.contains(&setting).then_some((table, setting))
        });
        if let Some((table, setting)) = known {
            return self.put(table, setting, text, origin);
        }
        let names = parts.and_then(|(table, _)| Some((table, settings_of(table)?)));
        let accepted = match names {
            Some((table, names)) => variables(table, names),
            None => String::from(
                "KVTIER_CONFIG and KVTIER_<TABLE>_<SETTING> for the tables server, state, host, \
                 disk, codec, operator, regions, limits and log; namespaces come from the file or --set",
            ),
        };
        self.problems.push(ConfigProblem::Unknown {
            origin,
            name: name.to_owned(),
            accepted,
        });
    }

    /// Adds one flag that stands for `table.setting`, `disk.NUMBER.setting` or
    /// `namespace.NAME.setting`.
    pub(super) fn flag(&mut self, flag: &str, key: &str, text: &str) {
        let origin = Origin::Flag(flag.to_owned());
        let parts: Vec<&str> = key.split('.').collect();
        match parts.as_slice() {
            [table, setting] if settings_of(table).is_some() => {
                self.put(table, setting, text, origin);
            }
            [DiskConfig::TABLE, number, setting] if self.is_disk(number) => {
                let value = Written::Text(text.to_owned());
                self.put_disk(number, setting, Given { value, origin });
            }
            [NamespaceConfig::TABLE, namespace, setting] => {
                self.put_namespace(namespace, setting, text, origin);
            }
            _ => self.problems.push(ConfigProblem::Unknown {
                origin,
                name: key.to_owned(),
                accepted: String::from(
                    "<table>.<setting>, disk.<number>.<setting> with numbers from 0 on, or \
                     namespace.<name>.<setting>, as docs/CONFIG.md lists them",
                ),
            }),
        }
    }

    /// One setting of a table that has one instance at most, over what earlier layers said.
    fn put(&mut self, table: &str, setting: &str, text: &str, origin: Origin) {
        let value = Written::Text(text.to_owned());
        let given = Given { value, origin };
        let single = SINGLE_TABLES.iter().find(|(name, _)| *name == table);
        if let Some((name, _)) = single {
            let entries = self.single.entry(name).or_default();
            entries.insert(setting.to_owned(), given);
            return;
        }
        self.every_disk.insert(setting.to_owned(), given.clone());
        if self.disks.is_empty() {
            self.disks.push(Entries::new());
        }
        for entries in &mut self.disks {
            entries.insert(setting.to_owned(), given.clone());
        }
    }

    /// True for the number of a disk, or of the one that would come next.
    fn is_disk(&self, number: &str) -> bool {
        number.parse().is_ok_and(|at: usize| at <= self.disks.len())
    }

    /// One setting of the disk with this number; the next one is made.
    fn put_disk(&mut self, number: &str, setting: &str, given: Given) {
        let at: usize = number.parse().unwrap_or(usize::MAX);
        if at == self.disks.len() {
            self.disks.push(self.every_disk.clone());
        }
        if let Some(entries) = self.disks.get_mut(at) {
            entries.insert(setting.to_owned(), given);
        }
    }

    /// One setting of the namespace with this name, which is made when there is none.
    fn put_namespace(&mut self, namespace: &str, setting: &str, text: &str, origin: Origin) {
        let is_it = |entries: &&mut Entries| {
            let name = entries.get("name").and_then(Given::decode::<String>);
            name.as_deref() == Some(namespace)
        };
        let given = |text: &str| Given {
            value: Written::Text(text.to_owned()),
            origin: origin.clone(),
        };
        if let Some(entries) = self.namespaces.iter_mut().find(is_it) {
            entries.insert(setting.to_owned(), given(text));
            return;
        }
        let name = (String::from("name"), given(namespace));
        let setting = (setting.to_owned(), given(text));
        self.namespaces.push(Entries::from([name, setting]));
    }
}

/// A file that is being read.
#[derive(Clone, Copy)]
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn origin(self, line: usize) -> Origin {
        let path = self.path.to_owned();
        Origin::File { path, line }
    }

    /// The settings of one table, each with its line.
    fn entries(self, values: &toml::Table, lines: Option<&DeTable<'_>>) -> Entries {
        let entry = |(name, value): (&String, &toml::Value)| {
            let place = lines.and_then(|lines| lines.get_key_value(name.as_str()));
            let at = place.map_or(0, |(key, _)| key.span().start);
            let given = Given {
                value: Written::Toml(value.clone()),
                origin: self.origin(line_of(self.text, at)),
            };
            (name.clone(), given)
        };
        values.iter().map(entry).collect()
    }

    /// The tables of a `[[name]]`.
    fn list(self, list: &[&toml::Table], lines: &DeValue<'_>) -> Vec<Entries> {
        let places = |index: usize| lines.get(index)?.get_ref().as_table();
        let entries = |(index, table): (usize, &&toml::Table)| self.entries(table, places(index));
        list.iter().enumerate().map(entries).collect()
    }
}

/// The tables of a list of tables; `None` for anything else.
fn list_of_tables(value: &toml::Value) -> Option<Vec<&toml::Table>> {
    value
        .as_array()?
        .iter()
        .map(toml::Value::as_table)
        .collect()
}

/// Line of a byte, from 1.
fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().iter().take(at);
    1 + before.filter(|byte| **byte == b'\n').count()
}

/// Settings of a table that variables and flags can reach.
fn settings_of(table: &str) -> Option<&'static [&'static str]> {
    if table == DiskConfig::TABLE {
        return Some(DiskConfig::NAMES);
    }
    let single = SINGLE_TABLES.iter().find(|(name, _)| *name == table);
    single.map(|(_, names)| *names)
}

fn variables(table: &str, names: &[&str]) -> String {
    let variable = |name: &&str| variable_of(table, name);
    names.iter().map(variable).collect::<Vec<_>>().join(", ")
}

/// Environment variable of a setting.
pub(super) fn variable_of(table: &str, setting: &str) -> String {
    format!("KVTIER_{table}_{setting}").to_ascii_uppercase()
}
