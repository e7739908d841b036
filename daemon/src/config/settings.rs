//! How a table of settings is declared once and read, checked and documented from that.
//!
//! Upstairs:   `tables` declares with `settings!`; `document` renders the fields.
//! Downstairs: `layers` holds what was given, `problem` says what is wrong with it.
//!
//! Invariants kept here
//!   C2  Reading goes on after a problem, so that one run names all of them.
//!   C3  A setting's name, default, range and text exist in one place: its declaration.
//!
//! Not here on purpose: no knowledge of any particular setting.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::layers::{Entries, Given};
use super::problem::ConfigProblem;

/// What a setting is when nobody gives it.
pub(super) enum Start<T> {
    /// This value.
    Default(T),
    /// This value, which stands for something computed that the text describes.
    Unset(T, &'static str),
    /// A problem.
    Required,
}

pub(super) fn default<T>(value: T) -> Start<T> {
    Start::Default(value)
}

pub(super) fn unset<T>(means: &'static str) -> Start<Option<T>> {
    Start::Unset(None, means)
}

pub(super) fn required<T>() -> Start<T> {
    Start::Required
}

/// Value of a setting that nobody gave, for the documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Initial {
    /// Written as TOML.
    Default(String),
    /// What happens instead.
    Unset(&'static str),
    /// It must be given.
    Required,
}

/// One declared setting, as the documents show it.
#[derive(Debug, Clone)]
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) about: &'static [&'static str],
    pub(super) initial: Initial,
    pub(super) accepts: &'static str,
}

impl Field {
    pub(super) fn new<T: Serialize>(
        name: &'static str,
        about: &'static [&'static str],
        start: Start<T>,
        accepts: &'static str,
    ) -> Self {
        let initial = match start {
            Start::Default(value) => Initial::Default(toml_text(&value)),
            Start::Unset(_, means) => Initial::Unset(means),
            Start::Required => Initial::Required,
        };
        Self {
            name,
            about,
            initial,
            accepts,
        }
    }
}

/// A value as one would write it in the file.
fn toml_text<T: Serialize>(value: &T) -> String {
    toml::Value::try_from(value).map_or_else(|_| String::from("?"), |value| value.to_string())
}

/// Reads the settings of one table and collects what is wrong with them.
pub(super) struct Reader<'a> {
    /// How problems name the table: `server`, `namespace[1]`.
    table: String,
    entries: Entries,
    problems: &'a mut Vec<ConfigProblem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        table: impl Into<String>,
        entries: Entries,
        problems: &'a mut Vec<ConfigProblem>,
    ) -> Self {
        Self {
            table: table.into(),
            entries,
            problems,
        }
    }

    /// Takes one setting. `None` when there is a problem with it.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &str,
        start: Start<T>,
        accepts: &str,
        check: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let key = format!("{}.{name}", self.table);
        let accepted = accepts.to_owned();
        let Some(given) = self.entries.remove(name) else {
            return match start {
                Start::Default(value) | Start::Unset(value, _) => Some(value),
                Start::Required => {
                    self.problems.push(ConfigProblem::Missing { key, accepted });
                    None
                }
            };
        };
        let value = given.decode::<T>().filter(check);
        if value.is_none() {
            self.problems.push(value_problem(given, key, accepted));
        }
        value
    }

    /// Reports what was given and is no setting of this table.
    pub(super) fn finish(self, known: &[&str]) {
        for (name, given) in self.entries {
            self.problems.push(ConfigProblem::Unknown {
                origin: given.origin,
                name: format!("{}.{name}", self.table),
                accepted: known.join(", "),
            });
        }
    }
}

fn value_problem(given: Given, key: String, accepted: String) -> ConfigProblem {
    ConfigProblem::Value {
        value: given.text(),
        origin: given.origin,
        key,
        accepted,
    }
}

/// Declares one table: a struct whose fields are settings, with what is needed to read and
/// document them. `if` names a check of a value that has the right type.
macro_rules! settings {
    ($(#[doc = $about:literal])+
     pub struct $name:ident in $table:literal { $(
        $(#[doc = $doc:literal])+
        $field:ident: $type:ty = $start:expr, accepts $accepts:literal $(, if $check:expr)?;
     )+ }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
        pub struct $name { $(
            $(#[doc = $doc])+
            #[doc = ""]
            #[doc = concat!("Accepted: ", $accepts, ".")]
            pub $field: $type,
        )+ }

        impl $name {
            /// Name of the table in the file.
            pub(super) const TABLE: &'static str = $table;
            /// What the table is about, a line each.
            pub(super) const ABOUT: &'static [&'static str] = &[$($about),+];
            /// Names of its settings.
            pub(super) const NAMES: &'static [&'static str] = &[$(stringify!($field)),+];

            /// Its settings, as the documents show them.
            pub(super) fn fields() -> Vec<Field> {
                vec![$({
                    let start: Start<$type> = $start;
                    Field::new(stringify!($field), &[$($doc),+], start, $accepts)
                }),+]
            }

            /// Reads the table; `None` when there is any problem with it.
            pub(super) fn read(mut from: Reader<'_>) -> Option<Self> {
                $(
                    let check: fn(&$type) -> bool = settings!(@check $($check)?);
                    let $field = from.take(stringify!($field), $start, $accepts, check);
                )+
                from.finish(Self::NAMES);
                Some(Self { $($field: $field?),+ })
            }
        }
    };
    (@check) => { |_| true };
    (@check $check:expr) => { $check };
}
pub(super) use settings;
