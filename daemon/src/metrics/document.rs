//! The metrics as a page of the documentation.
//!
//! Upstairs:   a test keeps `docs/METRICS.md` equal to this.
//! Downstairs: the declarations.

use std::fmt::Write;

use super::Metrics;

const HEAD: &str = "\
# Metrics

Generated from the declarations in `daemon/src/metrics.rs`; a test keeps it current.

The daemon serves them at `http://127.0.0.1:9471/metrics` (`server.metrics`) in the Prometheus
text format. Every series exists at zero from the start, those with a `device` for the devices
that are configured (`0` without any). Histograms have buckets from 25 us to
10 s. Names end in their unit; a name that ends in a plain noun counts those things now.

| metric | type | labels | meaning |
|---|---|---|---|
";

/// The reference page.
pub fn page() -> String {
    let mut text = String::from(HEAD);
    for metric in Metrics::declarations() {
        let label = |(name, values): &(&str, Vec<&str>)| match *name {
            "version" | "device" => format!("`{name}`"),
            _ => format!("`{name}`: {}", values.join(", ")),
        };
        let labels: Vec<String> = metric.labels.iter().map(label).collect();
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            metric.name,
            metric.kind,
            labels.join("<br>"),
            metric.help
        );
    }
    text
}
