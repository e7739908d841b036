//! Health and readiness of the process.
