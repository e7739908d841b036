//! Counting calls: each once, when it ends, with the status it ended with.
//!
//! Upstairs:   `server` wraps every call.
//! Downstairs: `metrics`.
//!
//! A unary call ends with its reply, a stream with its last message. Whatever is dropped before
//! that was cancelled by the client: so ends a session, whose stream lives until the client goes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio_stream::Stream;
use tonic::{Code, Status};

use super::Replies;
use crate::metrics::{self, Method, Metrics};

/// A call under way; counted when it is dropped.
pub(super) struct Counted {
    metrics: Arc<Metrics>,
    method: Method,
    begin: Instant,
    code: Code,
}

impl Counted {
    pub(super) fn begin(metrics: &Arc<Metrics>, method: Method) -> Self {
        Self {
            metrics: Arc::clone(metrics),
            method,
            begin: Instant::now(),
            code: Code::Cancelled,
        }
    }

    /// Notes how a call, or the begin of a stream, went.
    pub(super) fn ended<T>(&mut self, reply: &Result<T, Status>) {
        self.code = reply.as_ref().err().map_or(Code::Ok, Status::code);
    }

    /// Counts a stream that has begun when that ends.
    pub(super) fn stream<T: 'static>(mut self, replies: Replies<T>) -> Replies<T> {
        self.code = Code::Cancelled;
        let counted = self;
        Box::pin(CountedStream { replies, counted })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let code = metrics::Code::from(self.code);
        let seconds = self.begin.elapsed().as_secs_f64();
        self.metrics.rpcs.of((self.method, code)).inc();
        self.metrics.rpc_seconds.of(self.method).observe(seconds);
    }
}

struct CountedStream<T> {
    replies: Replies<T>,
    counted: Counted,
}

impl<T> Stream for CountedStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.replies.as_mut().poll_next(context);
        match &next {
            Poll::Ready(Some(Err(status))) => self.counted.code = status.code(),
            Poll::Ready(None) if self.counted.code == Code::Cancelled => {
                self.counted.code = Code::Ok;
            }
            _ => {}
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    fn count(metrics: &Metrics, code: metrics::Code) -> u64 {
        metrics.rpcs.of((Method::Restore, code)).get()
    }

    // Goal: a stream counts once, at its end, as what it ended with.
    #[tokio::test]
    async fn stream_counts_when_it_ends_and_not_when_it_begins() {
        let metrics = Arc::new(Metrics::new());
        let stream = |items: Vec<Result<u8, Status>>| {
            let mut counted = Counted::begin(&metrics, Method::Restore);
            counted.ended(&Ok(()));
            counted.stream(Box::pin(tokio_stream::iter(items)))
        };
        let mut whole = stream(vec![Ok(1), Ok(2)]);
        assert_eq!(whole.next().await.unwrap().unwrap(), 1);
        assert_eq!(count(&metrics, metrics::Code::Ok), 0, "it goes on");
        while whole.next().await.is_some() {}
        drop(whole);
        assert_eq!(count(&metrics, metrics::Code::Ok), 1);

        let mut failing = stream(vec![Ok(1), Err(Status::internal("broke"))]);
        while failing.next().await.is_some() {}
        drop(failing);
        assert_eq!(count(&metrics, metrics::Code::Internal), 1);

        let mut left = stream(vec![Ok(1), Ok(2)]);
        left.next().await;
        drop(left);
        assert_eq!(count(&metrics, metrics::Code::Cancelled), 1);
        assert_eq!(count(&metrics, metrics::Code::Ok), 1);
        assert_eq!(
            metrics.rpc_seconds.of(Method::Restore).get_sample_count(),
            3
        );
    }
}
