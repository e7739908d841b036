//! `explain`: where a block is, and why a lookup of it misses.
//!
//! Upstairs:   `kvtier explain`.
//! Downstairs: `Explain` and `Stats` of the control protocol.

use kvtier_proto::v1::{
    ExplainReply, ExplainRequest, MissReason, NamespaceStats, PayloadKind, StatsRequest, Tier,
    VariantInfo,
};
use kvtier_proto::{BlockKey, Miss, Quality};
use serde_json::{Value, json};

use super::connect::{CliError, connect, question};
use super::output::{Answer, section, size, table};
use super::{Target, key};

/// Flags of `explain`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    target: Target,
    /// Key of the block: 64 hex digits
    #[arg(value_parser = key)]
    key: BlockKey,
    /// Name or number of the namespace; needed when there are several
    #[arg(long, short)]
    namespace: Option<String>,
}

pub(super) async fn run(args: &Args) -> Result<Answer, CliError> {
    let mut client = connect(&args.target.socket).await?;
    let stats = client.stats(question(StatsRequest {})).await?.into_inner();
    let namespace_id = choose(&stats.namespaces, args.namespace.as_deref())?;
    let request = ExplainRequest {
        session: bytes::Bytes::new(),
        namespace_id,
        key: bytes::Bytes::copy_from_slice(args.key.as_bytes()),
    };
    let reply = client.explain(question(request)).await?.into_inner();
    Ok(answer(&args.key, namespace_id, &reply))
}

/// The namespace that is meant by a name or a number, or the only one.
fn choose(namespaces: &[NamespaceStats], asked: Option<&str>) -> Result<u32, CliError> {
    let names: Vec<&str> = namespaces.iter().map(|one| one.name.as_str()).collect();
    let found = match (asked, namespaces) {
        (None, [only]) => Some(only),
        (None, _) => None,
        (Some(asked), _) => {
            let number = asked.parse().ok();
            let by_name = namespaces.iter().find(|one| one.name == asked);
            by_name.or_else(|| {
                namespaces
                    .iter()
                    .find(|one| Some(one.namespace_id) == number)
            })
        }
    };
    let shown = asked.map_or(String::from("not given"), |asked| format!("{asked:?}"));
    found.map(|one| one.namespace_id).ok_or_else(|| {
        let names = names.join(", ");
        CliError::Usage(format!("--namespace is {shown}; accepted: {names}"))
    })
}

fn answer(key: &BlockKey, namespace_id: u32, reply: &ExplainReply) -> Answer {
    let miss = Miss::try_from(reply.miss()).ok();
    let verdict = match (miss, reply.miss()) {
        (Some(miss), _) => format!("would miss: {}. {}", miss.as_str(), meaning(miss)),
        (None, MissReason::Unspecified) => String::from("would hit"),
        (None, other) => format!("would miss: {}", other.as_str_name()),
    };
    let mut text = format!("block {key} in namespace {namespace_id}: {verdict}\n");
    let columns = [
        "kind", "tier", "level", ">stored", ">raw", ">tokens", ">leases", "pinned", "place",
    ];
    let mut rows = table(&columns);
    for one in &reply.variants {
        rows.add_row([
            kind(one.kind),
            tier(one.tier),
            format!("{} {}", one.level, one.level_name),
            size(one.stored_bytes),
            size(one.raw_bytes),
            one.tokens.to_string(),
            one.leases.to_string(),
            String::from(if one.pinned { "yes" } else { "no" }),
            place(one),
        ]);
    }
    text += &section("Variants", &rows);
    for parent in parents(reply) {
        text += &format!("\nparent {parent}\n");
    }
    for note in &reply.notes {
        text += &format!("\n{}\n", crate::log::clean(note));
    }
    Answer::new(to_json(key, namespace_id, miss, reply), text)
}

fn place(one: &VariantInfo) -> String {
    match one.device {
        Some(number) => format!("disk {number} {}", one.place),
        None => one.place.clone(),
    }
}

fn parents(reply: &ExplainReply) -> Vec<String> {
    let hex = |parent: &[u8]| BlockKey::from_slice(parent).map(|key| key.to_hex());
    let mut parents: Vec<String> = reply
        .variants
        .iter()
        .filter_map(|one| hex(&one.parent))
        .collect();
    parents.dedup();
    parents
}

fn kind(number: i32) -> String {
    let known = PayloadKind::try_from(number).ok();
    let ours = known.and_then(|kind| kvtier_proto::PayloadKind::try_from(kind).ok());
    ours.map_or_else(|| number.to_string(), |kind| kind.as_str().to_owned())
}

fn tier(number: i32) -> String {
    match Tier::try_from(number) {
        Ok(Tier::Host) => String::from("host"),
        Ok(Tier::Disk) => String::from("disk"),
        _ => number.to_string(),
    }
}

/// What a reason means to an operator.
pub(super) fn meaning(miss: Miss) -> &'static str {
    match miss {
        Miss::Absent => "Nobody saved it in this namespace, or not under this key.",
        Miss::Evicted => "It was here and made room for others: more capacity would keep it.",
        Miss::StaleEpoch => "Its place on the device holds an earlier life of the segment.",
        Miss::Misdirected => "The record at its place says it belongs elsewhere: check the device.",
        Miss::HeaderCrc => "The header of its record is damaged: check the device.",
        Miss::PayloadCrc => "A part of its payload is damaged: check the device.",
        Miss::WrongKey => "The record at its place is of another block: check the device.",
        Miss::WrongLayout => "It was written for another model layout.",
        Miss::Undecodable => "The codec refused its bytes: check the device and the version.",
        Miss::Unsupported => "It was written by a version that this daemon does not know.",
        Miss::Quality => "It is stored in a lossier form than the request takes.",
        Miss::Device => "The device did not deliver: see kvtier status for its state.",
        Miss::NoSpace => "Host memory to restore into is taken by leased blocks.",
        Miss::Deadline => "The request's deadline passed first.",
        Miss::NoTables => "The tables that it was coded with are not loaded (codec.tables).",
        Miss::Region => "The engine's region did not take it.",
    }
}

fn to_json(key: &BlockKey, namespace: u32, miss: Option<Miss>, reply: &ExplainReply) -> Value {
    let variants = reply.variants.iter().map(|one| {
        json!({
            "kind": kind(one.kind), "tier": tier(one.tier), "level": one.level,
            "level_name": one.level_name, "stored_bytes": one.stored_bytes,
            "raw_bytes": one.raw_bytes, "tokens": one.tokens, "leases": one.leases,
            "pinned": one.pinned, "place": one.place, "device": one.device,
            "quality": Quality::from(one.quality()).as_str(), "tables": one.tables,
            "parent": BlockKey::from_slice(&one.parent).map(|key| key.to_hex()),
        })
    });
    json!({
        "key": key.to_hex(),
        "namespace_id": namespace,
        "hit": reply.miss() == MissReason::Unspecified,
        "miss": miss.map(Miss::as_str),
        "variants": variants.collect::<Vec<_>>(),
        "notes": reply.notes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(id: u32, name: &str) -> NamespaceStats {
        NamespaceStats {
            namespace_id: id,
            name: name.to_owned(),
            ..NamespaceStats::default()
        }
    }

    #[test]
    fn namespace_is_found_by_name_then_number_or_is_the_only_one() {
        let two = [namespace(3, "a"), namespace(1, "3")];
        assert_eq!(choose(&two, Some("a")).unwrap(), 3);
        assert_eq!(choose(&two, Some("3")).unwrap(), 1);
        assert_eq!(choose(&two, Some("1")).unwrap(), 1);
        assert_eq!(choose(&two[..1], None).unwrap(), 3);
        let error = choose(&two, None).unwrap_err().to_string();
        assert_eq!(error, "--namespace is not given; accepted: a, 3");
        let error = choose(&two, Some("b")).unwrap_err().to_string();
        assert_eq!(error, "--namespace is \"b\"; accepted: a, 3");
    }

    #[test]
    fn hit_names_where_the_block_is() {
        let reply = ExplainReply {
            variants: vec![VariantInfo {
                kind: PayloadKind::Kv as i32,
                tier: Tier::Disk as i32,
                level: 8,
                level_name: String::from("zstd"),
                place: String::from("segment 4 at 8192"),
                device: Some(2),
                parent: vec![7; 32].into(),
                ..VariantInfo::default()
            }],
            ..ExplainReply::default()
        };
        let answer = answer(&BlockKey([0xab; 32]), 1, &reply);
        assert!(
            answer
                .text
                .starts_with("block abababab in namespace 1: would hit\n")
        );
        for part in [
            "kv",
            "disk",
            "8 zstd",
            "disk 2 segment 4 at 8192",
            "parent 0707",
        ] {
            assert!(answer.text.contains(part), "{part} not in {}", answer.text);
        }
        assert_eq!(answer.json["hit"], true);
        assert_eq!(answer.json["variants"][0]["parent"], "07".repeat(32));
    }

    #[test]
    fn miss_says_why_in_words() {
        let reply = ExplainReply {
            miss: MissReason::Evicted as i32,
            notes: vec![String::from("evicted 3 s ago")],
            ..ExplainReply::default()
        };
        let answer = answer(&BlockKey([1; 32]), 1, &reply);
        assert!(
            answer.text.contains("would miss: evicted. It was here"),
            "{}",
            answer.text
        );
        assert!(answer.text.contains("evicted 3 s ago"), "{}", answer.text);
        assert_eq!(answer.json["miss"], "evicted");
        assert_eq!(answer.code, 0);
    }
}
