//! The blocks of a prefix, found from the last one: what `Explain` says of each.
//!
//! Upstairs:   [`super`] asks.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   B1  Each block begins where the one before it ends, and the first at token 0: K is rotated by
//!       its position, and a sample that begins elsewhere would be read as another.
//!
//! Not here on purpose: no call.

use kvtier_proto::v1::{self, ExplainReply, VariantInfo};
use kvtier_proto::{BlockKey, Miss, Quality};

use crate::cli::explain::meaning;
use crate::tier::calibrate::DOCUMENT_TOKENS_MAX;

/// One block of a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) key: BlockKey,
    /// The block before; [`BlockKey::ROOT`] for the first.
    pub(super) parent: BlockKey,
    /// Index of its first token.
    pub(super) position: u32,
    pub(super) tokens: u32,
}

/// What is said of a block: where it stands in its prefix, and the model that it is of.
///
/// # Errors
/// Why no sample can be made of it, in a sentence.
pub(super) fn link(
    key: BlockKey,
    reply: &ExplainReply,
) -> Result<(Link, v1::ModelDescriptor), String> {
    let name = key.to_hex();
    let all: Vec<&VariantInfo> = reply
        .variants
        .iter()
        .filter(|one| one.kind() == v1::PayloadKind::Kv)
        .collect();
    if all.is_empty() {
        let miss = Miss::try_from(reply.miss()).unwrap_or(Miss::Absent);
        let (why, meaning) = (miss.as_str(), meaning(miss));
        return Err(format!("there is no KV of block {name}: {why}. {meaning}"));
    }
    let is_exact = |one: &&&VariantInfo| Quality::from(one.quality()) == Quality::Exact;
    if !all.iter().any(|one| is_exact(&one)) {
        let level = all.first().map_or("", |one| one.level_name.as_str());
        let level = crate::log::clean(level);
        return Err(format!(
            "block {name} is stored as {level}, which lost something; accepted: exact bytes"
        ));
    }
    let known = all.iter().filter(is_exact).find(|one| one.tokens > 0);
    let found = known.and_then(|one| {
        Some(Link {
            key,
            parent: BlockKey::from_slice(&one.parent)?,
            position: one.position,
            tokens: one.tokens,
        })
    });
    let found = found.ok_or_else(|| {
        format!("what block {name} follows is not known: the head of its record cannot be read")
    })?;
    let model = reply.model.clone().ok_or_else(|| {
        format!(
            "nobody has said what block {name} is made of: no session with its model has been open \
             since the daemon started. Connect the engine, then export"
        )
    })?;
    Ok((found, model))
}

/// Checks that `link` begins where it must (B1): `after` is the block that follows it.
///
/// # Errors
/// Where it begins or ends instead, in a sentence.
pub(super) fn follows(link: &Link, after: Option<&Link>) -> Result<(), String> {
    let name = link.key.to_hex();
    let (first, end) = (link.position, link.position.saturating_add(link.tokens));
    match after {
        None if usize::try_from(end).map_or(true, |end| end > DOCUMENT_TOKENS_MAX) => {
            return Err(format!(
                "the prefix of block {name} has {end} tokens; accepted: at most \
                 {DOCUMENT_TOKENS_MAX}"
            ));
        }
        Some(after) if after.position != end => {
            let (next, at) = (after.key.to_hex(), after.position);
            return Err(format!(
                "block {name} ends at token {end} of its prefix, and block {next} after it begins \
                 at {at}"
            ));
        }
        _ => {}
    }
    if (link.parent == BlockKey::ROOT) == (first == 0) {
        return Ok(());
    }
    Err(match first {
        0 => format!("block {name} begins at token 0 of its prefix, and follows another"),
        first => format!(
            "block {name} follows none and begins at token {first} of its prefix; accepted: 0"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: BlockKey = BlockKey([0xab; 32]);

    fn variant(quality: v1::Quality) -> VariantInfo {
        VariantInfo {
            kind: v1::PayloadKind::Kv as i32,
            level_name: "balanced".to_owned(),
            quality: quality as i32,
            parent: vec![7; 32].into(),
            tokens: 16,
            position: 32,
            ..VariantInfo::default()
        }
    }

    fn reply(variants: Vec<VariantInfo>) -> ExplainReply {
        ExplainReply {
            variants,
            model: Some(v1::ModelDescriptor::default()),
            ..ExplainReply::default()
        }
    }

    #[test]
    fn block_is_taken_from_whichever_exact_variant_says_where_it_stands() {
        let without_head = VariantInfo {
            tokens: 0,
            parent: Vec::new().into(),
            ..variant(v1::Quality::Exact)
        };
        let lossy = VariantInfo {
            tokens: 5,
            ..variant(v1::Quality::Balanced)
        };
        let all = vec![without_head, lossy, variant(v1::Quality::Exact)];
        let (link, _) = link(KEY, &reply(all)).unwrap();
        let want = Link {
            key: KEY,
            parent: BlockKey([7; 32]),
            position: 32,
            tokens: 16,
        };
        assert_eq!(link, want);
    }

    #[test]
    fn block_that_makes_no_sample_is_named_with_the_reason() {
        let says = |reply: &ExplainReply, parts: [&str; 2]| {
            let text = link(KEY, reply).unwrap_err();
            let name = KEY.to_hex();
            for part in parts.into_iter().chain([name.as_str()]) {
                assert!(text.contains(part), "{part} not in {text}");
            }
        };
        let mut absent = reply(Vec::new());
        absent.miss = v1::MissReason::Evicted as i32;
        says(&absent, ["no KV of block", "evicted. It was here"]);
        let hidden = VariantInfo {
            kind: v1::PayloadKind::Hidden as i32,
            ..variant(v1::Quality::Exact)
        };
        says(&reply(vec![hidden]), ["no KV of block", "absent"]);
        let lossy = reply(vec![variant(v1::Quality::Balanced)]);
        says(&lossy, ["stored as balanced", "accepted: exact bytes"]);
        let unread = VariantInfo {
            tokens: 0,
            ..variant(v1::Quality::Exact)
        };
        says(&reply(vec![unread]), ["not known", "head of its record"]);
        let mut unknown = reply(vec![variant(v1::Quality::Exact)]);
        unknown.model = None;
        says(
            &unknown,
            ["no session with its model", "Connect the engine"],
        );
    }

    #[test]
    fn blocks_that_do_not_begin_where_the_one_before_ends_are_refused() {
        let at = |parent: u8, position, tokens| Link {
            key: KEY,
            parent: BlockKey([parent; 32]),
            position,
            tokens,
        };
        let last = at(1, 32, 7);
        assert_eq!(follows(&last, None), Ok(()));
        assert_eq!(follows(&at(1, 16, 16), Some(&last)), Ok(()));
        assert_eq!(follows(&at(0, 0, 32), Some(&last)), Ok(()));
        let problem = |link: Link, after: Option<&Link>| follows(&link, after).unwrap_err();
        assert!(problem(at(1, 16, 15), Some(&last)).contains("ends at token 31"));
        assert!(problem(at(0, 16, 16), Some(&last)).contains("begins at token 16"));
        assert!(problem(at(1, 0, 32), Some(&last)).contains("follows another"));
        assert!(problem(at(1, u32::MAX, 7), None).contains("at most 1048576"));
    }
}
