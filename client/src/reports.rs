//! Prefill times on their way to the daemon.
//!
//! Upstairs:   `two_ended`, and engines through `Session::report_prefill`.
//! Downstairs: one task a session sends `ReportPrefill` with all that has gathered.
//!
//! They are advice: a full queue loses the oldest, and a call that fails is not repeated.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use kvtier_proto::limits::REPORTS_PER_CALL_MAX;
use kvtier_proto::v1;
use tokio::sync::Notify;

use crate::release::Life;
use crate::rpc::Rpc;
use crate::two_ended::PrefillStep;

/// Steps that wait for a slow daemon.
const WAITING_MAX: usize = 4 * REPORTS_PER_CALL_MAX;

/// What one session will tell.
#[derive(Default)]
pub(crate) struct Reports {
    waiting: Mutex<VecDeque<PrefillStep>>,
    some: Notify,
}

impl Reports {
    pub(crate) fn put(&self, step: PrefillStep) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == WAITING_MAX {
            waiting.pop_front();
        }
        waiting.push_back(step);
        drop(waiting);
        self.some.notify_one();
    }

    /// Up to one call's worth.
    fn take(&self, session: &Bytes) -> Option<v1::ReportPrefillRequest> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = waiting.len().min(REPORTS_PER_CALL_MAX);
        let report = |step: PrefillStep| v1::PrefillReport {
            before: step.before,
            tokens: step.tokens,
            micros: u64::try_from(step.took.as_micros()).unwrap_or(u64::MAX),
        };
        let reports: Vec<_> = waiting.drain(..count).map(report).collect();
        let session = session.clone();
        (!reports.is_empty()).then_some(v1::ReportPrefillRequest { session, reports })
    }

    /// Sends what gathers until the session is lost.
    pub(crate) async fn run(
        self: Arc<Self>,
        rpc: Rpc,
        session: Bytes,
        life: Arc<Life>,
        limit: Duration,
    ) {
        while !life.is_lost() {
            let Some(request) = self.take(&session) else {
                tokio::select! {
                    () = self.some.notified() => continue,
                    _ = life.lost() => break,
                }
            };
            let mut client = rpc.clone();
            let sent = tokio::time::timeout(limit, client.report_prefill(request)).await;
            if let Ok(Err(status)) = sent {
                tracing::debug!(%status, "prefill times were not taken");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn put_loses_the_oldest_when_nobody_takes_them_and_take_gives_one_calls_worth() {
        let reports = Reports::default();
        for before in 0..u32::try_from(WAITING_MAX + 3).unwrap() {
            reports.put(PrefillStep {
                before,
                tokens: 16,
                took: Duration::from_micros(5),
            });
        }
        let first = reports.take(&Bytes::new()).unwrap().reports;
        assert_eq!(first.len(), REPORTS_PER_CALL_MAX);
        assert_eq!((first[0].before, first[0].micros), (3, 5));
        for _ in 1..4 {
            assert!(reports.take(&Bytes::new()).is_some());
        }
        assert!(reports.take(&Bytes::new()).is_none());
    }
}
