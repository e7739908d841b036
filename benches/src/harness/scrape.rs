//! One look at the daemon's metrics.
//!
//! Upstairs:   tests read what `daemon` fetched.
//! Downstairs: text.

use std::collections::BTreeMap;

/// All series of one scrape.
#[derive(Debug, Clone)]
pub struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    /// Reads the Prometheus text format.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self(series.collect())
    }

    /// The value of a series, named as the text names it: `kvtier_leases`,
    /// `kvtier_miss_total{reason="device"}`. A series that is not there is a defect.
    pub fn get(&self, series: &str) -> f64 {
        let value = self.0.get(series);
        *value.unwrap_or_else(|| panic!("no series {series}; there are {:?}", self.0.keys()))
    }

    /// State of the only device, in the metrics' word for it.
    pub fn disk_state(&self) -> &str {
        let state = |name: &str| name.starts_with("kvtier_disk_state{");
        let mut on = (self.0.iter()).filter(|(name, value)| state(name) && **value == 1.0);
        let name = on.next().map_or("", |(name, _)| name.as_str());
        let state = name.split_once("state=\"").map_or("", |(_, rest)| rest);
        state.split('"').next().unwrap_or_default()
    }

    /// Sum over every label of a metric.
    pub fn sum(&self, name: &str) -> f64 {
        let of_name = |series: &&String| {
            let rest = series.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        let found: Vec<_> = self.0.keys().filter(of_name).collect();
        assert!(!found.is_empty(), "no metric {name}");
        found.into_iter().map(|series| self.0[series]).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_state_is_the_one_that_is_on() {
        let text = "kvtier_disk_state{state=\"full\"} 0\n\
                    kvtier_disk_state{device=\"0\",state=\"read_only\"} 1\n";
        assert_eq!(Scrape::parse(text).disk_state(), "read_only");
    }

    #[test]
    fn scrape_reads_plain_and_labelled_series_and_sums_over_labels() {
        let text = "# HELP a x\na 1\nb{c=\"d e\"} 2.5\nb{c=\"f\"} 3\nbb 9\n";
        let scrape = Scrape::parse(text);
        assert_eq!(scrape.get("a"), 1.0);
        assert_eq!(scrape.get("b{c=\"d e\"}"), 2.5);
        assert_eq!(scrape.sum("b"), 5.5);
    }
}
