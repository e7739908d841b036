//! The HTTP endpoint: metrics, health, readiness.
