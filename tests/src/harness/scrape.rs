//! One look at the daemon's HTTP endpoint.
//!
//! Upstairs:   `daemon` waits for /readyz, tests read /metrics.
//! Downstairs: a plain socket; nothing here shares code with the daemon's HTTP.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Status code and body of a page.
pub fn page(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: kvtierd\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let bad = || std::io::Error::other(format!("{answer:?} is no HTTP answer"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((code.ok_or_else(bad)?, body.to_owned()))
}

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
    /// `kvtier_disk_bytes_total{direction="read"}`. A series that is not there is a defect.
    pub fn get(&self, series: &str) -> f64 {
        let value = self.0.get(series);
        *value.unwrap_or_else(|| panic!("no series {series}; there are {:?}", self.0.keys()))
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
    fn scrape_reads_plain_and_labelled_series_and_sums_over_labels() {
        let text = "# HELP a x\na 1\nb{c=\"d e\"} 2.5\nb{c=\"f\"} 3\nbb 9\n";
        let scrape = Scrape::parse(text);
        assert_eq!(scrape.get("a"), 1.0);
        assert_eq!(scrape.get("b{c=\"d e\"}"), 2.5);
        assert_eq!(scrape.sum("b"), 5.5);
    }
}
