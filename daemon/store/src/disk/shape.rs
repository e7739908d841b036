//! What an operation and a name must look like, whatever lane is asked.
//!
//! Upstairs:   the real lanes refuse what is misshapen; the simulated one does not let it pass.
//! Downstairs: nothing.

use std::io::{Error, ErrorKind};

use super::{Op, OpKind, RUNS_MAX};

/// Largest single operation. Unit: bytes. A longer one would come back short anyway.
const LEN_MAX: usize = 1 << 30;

/// What is wrong with an operation, in words, before a device is asked.
pub(super) fn check(op: &Op, align: usize) -> std::io::Result<()> {
    let wrong = |text: String| Err(Error::new(ErrorKind::InvalidInput, text));
    if op.kind == OpKind::Sync {
        return if op.len == 0 {
            Ok(())
        } else {
            wrong("a sync has no length".into())
        };
    }
    let Some(buf) = &op.buf else {
        return wrong("a read or write needs a buffer".into());
    };
    let first = (buf.len(), op.buf_at, op.len);
    let more = (op.more.iter()).map(|run| (run.buf.len(), run.buf_at, run.len));
    for (room, buf_at, len) in std::iter::once(first).chain(more) {
        check_run(align, op.at, room, buf_at, len).or_else(wrong)?;
    }
    if op.total() > LEN_MAX || op.more.len() > RUNS_MAX {
        let (total, runs) = (op.total(), op.more.len());
        return wrong(format!(
            "{total} bytes in 1 + {runs} runs are not in 1 ..= {LEN_MAX}, 1 + {RUNS_MAX}"
        ));
    }
    if i64::try_from(op.at)
        .ok()
        .and_then(|at| at.checked_add(LEN_MAX as i64))
        .is_none()
    {
        return wrong(format!("offset {} is past the largest file", op.at));
    }
    Ok(())
}

fn check_run(align: usize, at: u64, room: usize, buf_at: usize, len: usize) -> Result<(), String> {
    if !at.is_multiple_of(align as u64)
        || !buf_at.is_multiple_of(align)
        || !len.is_multiple_of(align)
    {
        return Err(format!(
            "{len} bytes at {at} to {buf_at} are not multiples of {align}"
        ));
    }
    if len == 0 || len > LEN_MAX {
        return Err(format!("length {len} is not in 1 ..= {LEN_MAX}"));
    }
    if buf_at.checked_add(len).is_none_or(|end| end > room) {
        return Err(format!(
            "{len} bytes at {buf_at} do not fit a buffer of {room}"
        ));
    }
    Ok(())
}

/// A name of one file in the directory itself.
pub(super) fn check_name(name: &str) -> std::io::Result<()> {
    if name.is_empty() || name.len() > 255 || name.contains(['/', '\0']) || name.starts_with('.') {
        let text = format!("{name:?} is no file name: 1 to 255 bytes, no '/', no leading '.'");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(())
}
