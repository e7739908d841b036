//! The operator command line `kvtier`.
