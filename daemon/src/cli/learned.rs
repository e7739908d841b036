//! The part of `status` that speaks of restores to come: how fast blocks and engines are, and how
//! the last two-ended restores went beside what was expected.
//!
//! Upstairs:   `status`.
//! Downstairs: the daemon's answer.

use kvtier_proto::v1::{Outlook, StatsReply};
use serde_json::{Value, json};

use super::output::{section, table};

/// What restores have learned; nothing of what nobody has seen yet.
pub(super) fn learned(stats: &StatsReply) -> String {
    let mut text = String::new();
    if !stats.rates.is_empty() {
        let mut rows = table(&["device", "level", ">MiB/s", ">blocks"]);
        for one in &stats.rates {
            let mib = format!("{:.1}", one.bytes_s / f64::from(1 << 20));
            let (device, blocks) = (one.device.to_string(), one.blocks.to_string());
            rows.add_row([device, one.level.clone(), mib, blocks]);
        }
        text += &section("Blocks have come at", &rows);
    }
    if !stats.engines.is_empty() {
        let columns = [
            "namespace",
            "layout",
            ">ms a step",
            ">us a token",
            ">ns a token before",
            ">ns a pair",
            ">steps",
        ];
        let mut rows = table(&columns);
        for one in &stats.engines {
            rows.add_row([
                one.namespace_id.to_string(),
                one.layout.clone(),
                format!("{:.3}", one.fixed_s * 1e3),
                format!("{:.2}", one.per_token_s * 1e6),
                format!("{:.2}", one.per_context_s * 1e9),
                format!("{:.3}", one.attention_s * 1e9),
                one.steps.to_string(),
            ]);
        }
        text += &section("Engines' prefill", &rows);
    }
    if !stats.met.is_empty() {
        let columns = [
            "namespace",
            ">ms",
            ">expected",
            ">if loaded",
            ">if computed",
            ">computed",
            ">loaded",
            "why",
        ];
        let mut rows = table(&columns);
        for one in &stats.met {
            let outlook = one.outlook.clone().unwrap_or_default();
            rows.add_row([
                one.namespace_id.to_string(),
                millis(one.took_us),
                millis(outlook.planned_us),
                millis(outlook.load_us),
                millis(outlook.compute_us),
                one.computed_blocks.to_string(),
                one.loaded_blocks.to_string(),
                crate::log::clean(&outlook.reason).to_string(),
            ]);
        }
        text += &section("Two-ended restores", &rows);
    }
    text
}

/// The same as JSON.
pub(super) fn learned_json(stats: &StatsReply) -> Value {
    let outlook = |outlook: &Outlook| {
        json!({
            "planned_us": outlook.planned_us, "load_us": outlook.load_us,
            "compute_us": outlook.compute_us, "compute_blocks": outlook.compute_blocks,
            "load_blocks": outlook.load_blocks, "reason": outlook.reason,
        })
    };
    let rates = stats.rates.iter().map(|one| {
        json!({
            "device": one.device, "level": one.level, "bytes_s": one.bytes_s,
            "blocks": one.blocks,
        })
    });
    let engines = stats.engines.iter().map(|one| {
        json!({
            "namespace_id": one.namespace_id, "layout": one.layout, "steps": one.steps,
            "fixed_s": one.fixed_s, "per_context_s": one.per_context_s,
            "per_token_s": one.per_token_s, "attention_s": one.attention_s,
        })
    });
    let met = stats.met.iter().map(|one| {
        json!({
            "namespace_id": one.namespace_id, "took_us": one.took_us,
            "computed_blocks": one.computed_blocks, "loaded_blocks": one.loaded_blocks,
            "outlook": one.outlook.as_ref().map(outlook),
        })
    });
    json!({
        "rates": rates.collect::<Vec<_>>(),
        "engines": engines.collect::<Vec<_>>(),
        "met": met.collect::<Vec<_>>(),
    })
}

fn millis(micros: u64) -> String {
    match micros {
        0 => String::from("-"),
        _ => {
            #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
            let millis = micros as f64 / 1e3;
            format!("{millis:.1}")
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_proto::v1::{EngineStats, MetStats, RateStats};

    use super::*;

    #[test]
    fn learned_shows_what_was_expected_beside_what_came() {
        let stats = StatsReply {
            rates: vec![RateStats {
                device: 1,
                level: "lossless".into(),
                bytes_s: f64::from(300 << 20),
                blocks: 64,
            }],
            engines: vec![EngineStats {
                namespace_id: 2,
                layout: "0a0b0c0d".into(),
                fixed_s: 4e-3,
                per_token_s: 35e-6,
                steps: 12,
                ..EngineStats::default()
            }],
            met: vec![MetStats {
                namespace_id: 2,
                outlook: Some(Outlook {
                    planned_us: 100_000,
                    load_us: 200_500,
                    reason: "both\ntogether".into(),
                    ..Outlook::default()
                }),
                took_us: 103_210,
                computed_blocks: 9,
                loaded_blocks: 11,
            }],
            ..StatsReply::default()
        };
        let text = learned(&stats);
        for part in [
            "300.0", "lossless", "4.000", "35.00", "103.2", "100.0", "200.5", " - ",
        ] {
            assert!(text.contains(part), "{part} not in {text}");
        }
        assert!(!text.contains("both\ntogether"), "{text}");
        assert_eq!(
            learned_json(&stats)["met"][0]["outlook"]["load_us"],
            200_500
        );
        assert_eq!(learned(&StatsReply::default()), "");
    }
}
