//! What the endpoint promises, over real connections.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::health::State;
use crate::metrics::Device;

struct Served {
    address: SocketAddr,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn served() -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (health, metrics) = (Arc::new(Health::new()), Arc::new(Metrics::new()));
    let endpoint = Endpoint::new(Arc::clone(&metrics), Arc::clone(&health));
    let gauge = Arc::clone(&metrics);
    let endpoint = endpoint.refresh_with(move || gauge.leases.set(7));
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(endpoint.serve(listener, async move {
        let _ = stopped.await;
    }));
    Served {
        address,
        health,
        metrics,
        stop,
        task,
    }
}

async fn send(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    send(address, &request).await
}

#[tokio::test]
async fn metrics_page_is_fresh_and_in_the_prometheus_format() {
    let served = served().await;
    served.metrics.disk_errors.of(Device::FIRST).inc();
    let answer = get(served.address, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("content-type: text/plain; version=0.0.4"),
        "{answer}"
    );
    assert!(
        answer.contains("\nkvtier_disk_errors_total{device=\"0\"} 1\n"),
        "{answer}"
    );
    assert!(answer.contains("\nkvtier_leases 7\n"), "{answer}");
}

#[tokio::test]
async fn readiness_follows_the_state_and_health_follows_failures() {
    let served = served().await;
    for state in [State::Starting, State::Recovering, State::Draining] {
        served.health.enter(state);
        let ready = get(served.address, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
        assert!(
            ready.ends_with(&format!("\r\n\r\n{}\n", state.as_str())),
            "{ready}"
        );
        let live = get(served.address, "/healthz").await;
        assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    }
    served.health.fail("disk lane stopped");
    let live = get(served.address, "/healthz").await;
    assert!(
        live.starts_with("HTTP/1.1 503") && live.ends_with("disk lane stopped\n"),
        "{live}"
    );
}

#[tokio::test]
async fn readiness_is_given_while_serving() {
    let served = served().await;
    served.health.enter(State::Serving);
    let ready = get(served.address, "/readyz").await;
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.ends_with("serving\n"),
        "{ready}"
    );
}

#[tokio::test]
async fn wrong_paths_and_methods_are_told_what_is_there() {
    let served = served().await;
    let lost = get(served.address, "/metric").await;
    assert!(
        lost.starts_with("HTTP/1.1 404") && lost.ends_with(PATHS),
        "{lost}"
    );
    let post =
        "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let refused = send(served.address, post).await;
    assert!(refused.starts_with("HTTP/1.1 405"), "{refused}");
    assert!(refused.contains("allow: GET, HEAD"), "{refused}");
}

#[tokio::test]
async fn oversized_headers_are_refused() {
    let served = served().await;
    let long = "x".repeat(4 * HEADER_BYTES_MAX);
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\nX-Long: {long}\r\n\r\n");
    // The server may close before it read everything.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    assert!(
        get(served.address, "/healthz")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

// Goal: an idle connection does not hold up the end of the process.
#[tokio::test]
async fn endpoint_stops_when_told_whoever_is_connected() {
    let served = served().await;
    let _idle = TcpStream::connect(served.address).await.unwrap();
    get(served.address, "/healthz").await;
    served.stop.send(()).unwrap();
    served.task.await.unwrap();
    assert!(TcpStream::connect(served.address).await.is_err());
}
