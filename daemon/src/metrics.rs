//! All metrics of the daemon.
