//! At which level a block is stored: what the configuration wants, as far as its namespace lets it.
//! Pure functions.
//!
//! Upstairs:   `save` asks for the level of a new block, `recode` for the one of a cold block.
//! Downstairs: nothing: no I/O, no clock.
//!
//! Invariants kept here
//!   A3  Nothing is stored at a worse quality than its namespace tolerates.
//!
//! Not here on purpose: no word on what a request accepts. That is looked at when it asks.

use std::time::Duration;

use kvtier_proto::{Bytes, Level, Quality};

/// What becomes of blocks that nobody has used for long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cold {
    /// The level that they are re-encoded to.
    pub level: Level,
    /// Time without use after which a block is cold.
    pub after: Duration,
    /// Bytes of records that are read for it a second, at least 1.
    pub rate: Bytes,
}

/// The level to store a new block at, when `wanted` is the configured one. Where the namespace
/// does not tolerate that, or the level is not for such blocks, it is bit-exact: what costs more
/// room is no surprise to anybody.
pub fn level_to_store(wanted: Level, lowest: Quality, applies: impl Fn(Level) -> bool) -> Level {
    if lowest.accepts(wanted.quality()) && applies(wanted) {
        return wanted;
    }
    let falls_back = wanted.quality() != Quality::Exact || wanted.needs_tables();
    match falls_back && applies(Level::LOSSLESS) {
        true => Level::LOSSLESS,
        false => Level::RAW,
    }
}

/// The quality of what a save stores at worst. A block that is stored this good or better is there
/// already: to save it again would change nothing.
pub fn quality_of_saves(wanted: Level, lowest: Quality) -> Quality {
    match lowest.accepts(wanted.quality()) {
        true => wanted.quality(),
        false => Quality::Exact,
    }
}

/// True when a block of the level and quality `now` may go down to the level of cold blocks: it is
/// exact, and the namespace tolerates that level. What went through a lossy level once is not sent
/// through another: errors add up, and what a level promises holds for bytes as they were saved.
pub fn may_go_down(now: (Level, Quality), cold: Level, lowest: Quality) -> bool {
    let (level, quality) = now;
    level != cold && quality == Quality::Exact && lowest.accepts(cold.quality())
}

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator;

    use super::*;

    fn levels() -> impl Iterator<Item = Level> {
        (0..=u8::MAX).map(Level)
    }

    #[test]
    fn level_to_store_is_never_worse_than_the_namespace_tolerates() {
        for wanted in levels() {
            for lowest in Quality::iter() {
                for applies in [|_| true, |_| false, |level| level == Level::LOSSLESS] {
                    let level = level_to_store(wanted, lowest, applies);
                    assert!(
                        lowest.accepts(level.quality()),
                        "{wanted} {lowest:?}: {level}"
                    );
                    assert!(level == Level::RAW || applies(level));
                    assert!(quality_of_saves(wanted, lowest).accepts(level.quality()));
                }
            }
        }
    }

    #[test]
    fn level_to_store_is_the_configured_one_where_that_is_allowed_and_applies() {
        let store = |wanted, lowest| level_to_store(wanted, lowest, |_| true);
        assert_eq!(store(Level::ZSTD, Quality::Exact), Level::ZSTD);
        assert_eq!(store(Level::SMALL, Quality::Small), Level::SMALL);
        assert_eq!(store(Level::SMALL, Quality::Balanced), Level::LOSSLESS);
        assert_eq!(store(Level::INT8, Quality::Small), Level::LOSSLESS);
        assert_eq!(store(Level::INT8, Quality::Any), Level::INT8);
        assert_eq!(
            level_to_store(Level::ZSTD, Quality::Any, |_| false),
            Level::RAW
        );
    }

    #[test]
    fn a_block_goes_down_once_and_only_as_far_as_its_namespace_tolerates() {
        let plain = |level: Level| (level, level.quality());
        for (now, cold) in levels().flat_map(|now| levels().map(move |cold| (now, cold))) {
            for lowest in Quality::iter() {
                if may_go_down(plain(now), cold, lowest) {
                    assert!(lowest.accepts(cold.quality()), "{now} to {cold}");
                    assert_ne!(now, cold);
                    assert_eq!(now.quality(), Quality::Exact, "{now} to {cold}");
                }
            }
        }
        let goes = |now, cold, lowest| may_go_down(plain(now), cold, lowest);
        assert!(goes(Level::RAW, Level::LOSSLESS_C, Quality::Exact));
        assert!(goes(Level::LOSSLESS, Level::SMALL, Quality::Small));
        assert!(!goes(Level::LOSSLESS, Level::SMALL, Quality::Balanced));
        assert!(!goes(Level::INT8, Level::LOSSLESS, Quality::Any));
        assert!(!goes(Level::TRANSPARENT, Level::SMALL, Quality::Small));
        // Made of what had gone through another.
        let made_of = (Level::LOSSLESS, Quality::Balanced);
        assert!(!may_go_down(made_of, Level::SMALL, Quality::Small));
    }
}
