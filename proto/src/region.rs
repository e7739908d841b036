//! An engine's own memory as a region: where its slots lie, and what is answered to its descriptor.
//!
//! Upstairs:   the SDK describes the pool of its engine; the daemon checks the description at the
//!             door and copies by it.
//! Downstairs: `limits`.
//!
//! A slot is a place for one whole block. Its pieces are rows in equal distance; the bytes of all
//! rows, one after the other, are the payload. So the layer-first pool of one engine and the
//! page-first pool of another are the same to the daemon.
//!
//! Invariants kept here
//!   Z1  Every row of every slot of a geometry that passed its check lies inside the region.
//!   Z2  No two slots of one piece share a byte, and no two rows of slot 0. What an engine
//!       describes worse than that costs only its own bytes.

use crate::limits::{BLOCK_BYTES_MAX, ENGINE_SLOTS_MAX, PIECES_MAX, ROWS_MAX};
use crate::units::Bytes;
use crate::v1;
use crate::vocabulary::PayloadKind;
use crate::wire::WireError;

/// Rows in equal distance. Unit of all but `rows`: bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Piece {
    /// First byte of the first row of slot 0, in the file.
    pub offset: u64,
    /// From a slot's first row to the next slot's.
    pub slot_stride: u64,
    /// Rows of a slot.
    pub rows: u32,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// From a row of a slot to its next.
    pub row_stride: u64,
}

impl Piece {
    /// One row a slot.
    pub const fn row(offset: u64, bytes: u64, slot_stride: u64) -> Self {
        Self {
            offset,
            slot_stride,
            rows: 1,
            row_bytes: bytes,
            row_stride: bytes,
        }
    }

    fn bytes(&self) -> Option<u64> {
        u64::from(self.rows).checked_mul(self.row_bytes)
    }

    /// From the first byte of a slot's first row to the end of its last.
    fn extent(&self) -> Option<u64> {
        let rows = u64::from(self.rows).checked_sub(1)?;
        rows.checked_mul(self.row_stride)?
            .checked_add(self.row_bytes)
    }

    /// End of the last slot's last row.
    fn end(&self, slots: u32) -> Option<u64> {
        let last = u64::from(slots).checked_sub(1)?;
        let start = last.checked_mul(self.slot_stride)?;
        start.checked_add(self.offset)?.checked_add(self.extent()?)
    }

    /// Slots lie one behind the other, or take turns row by row.
    fn apart(&self, slots: u32) -> bool {
        let behind = self.extent().is_some_and(|len| self.slot_stride >= len);
        let turn = u64::from(slots.saturating_sub(1)).checked_mul(self.slot_stride);
        let turn = turn.and_then(|turn| turn.checked_add(self.row_bytes));
        let turns = self.slot_stride >= self.row_bytes
            && (self.rows == 1 || turn.is_some_and(|turn| self.row_stride >= turn));
        slots == 1 || behind || turns
    }
}

/// Where the slots of an engine's region lie.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegionGeometry {
    /// What the slots hold.
    pub kind: PayloadKind,
    /// How many there are.
    pub slots: u32,
    /// Pieces of a slot, in the order of the payload.
    pub pieces: Vec<Piece>,
}

/// Neighbouring bytes of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte in the file.
    pub at: u64,
    /// First byte in the payload.
    pub from: usize,
    /// How many there are.
    pub len: usize,
}

impl RegionGeometry {
    /// Reads a message. What it says is not checked against any region yet.
    ///
    /// # Errors
    /// The field that is out of range.
    pub fn from_wire(wire: Option<&v1::RegionGeometry>) -> Result<Self, WireError> {
        let wire =
            wire.ok_or_else(|| WireError::field("geometry", "missing", "where the slots lie"))?;
        let kind = v1::PayloadKind::try_from(wire.kind).unwrap_or_default();
        let kind = PayloadKind::try_from(kind)?;
        if wire.pieces.is_empty() || wire.pieces.len() > PIECES_MAX {
            let value = format!("{} entries long", wire.pieces.len());
            let accepted = format!("1 to {PIECES_MAX} entries");
            return Err(WireError::field("geometry.pieces", value, accepted));
        }
        let piece = |piece: &v1::RegionPiece| Piece {
            offset: piece.offset,
            slot_stride: piece.slot_stride,
            rows: piece.rows,
            row_bytes: piece.row_bytes,
            row_stride: piece.row_stride,
        };
        Ok(Self {
            kind,
            slots: wire.slots,
            pieces: wire.pieces.iter().map(piece).collect(),
        })
    }

    /// Bytes of a slot: those of a block's payload. `None` where they cannot be added up.
    pub fn slot_bytes(&self) -> Option<u64> {
        let add = |sum: u64, piece: &Piece| sum.checked_add(piece.bytes()?);
        self.pieces.iter().try_fold(0, add)
    }

    /// Checks everything against a region of `bytes` bytes (Z1, Z2), whose slots hold payloads of
    /// `payload` bytes where the model says how long they are.
    ///
    /// # Errors
    /// The field that is out of range.
    pub fn check(&self, bytes: u64, payload: Option<u64>) -> Result<(), WireError> {
        let wrong = |field: &str, value: String, accepted: String| {
            Err(WireError::field(
                format!("geometry.{field}"),
                value,
                accepted,
            ))
        };
        if self.slots == 0 || self.slots > ENGINE_SLOTS_MAX {
            let accepted = format!("1 to {ENGINE_SLOTS_MAX}");
            return wrong("slots", self.slots.to_string(), accepted);
        }
        for (index, piece) in self.pieces.iter().enumerate() {
            self.check_piece(index, piece, bytes)?;
        }
        let rows: u64 = self.pieces.iter().map(|piece| u64::from(piece.rows)).sum();
        if rows > ROWS_MAX.into() {
            return wrong(
                "pieces",
                format!("{rows} rows"),
                format!("at most {ROWS_MAX}"),
            );
        }
        let sum = self.slot_bytes().unwrap_or(u64::MAX);
        match payload {
            Some(payload) if payload != sum => {
                let accepted = format!("exactly {payload}, the payload of a full block");
                return wrong("pieces", format!("{sum} bytes a slot"), accepted);
            }
            None if sum > BLOCK_BYTES_MAX.get() => {
                let accepted = format!("at most {BLOCK_BYTES_MAX}");
                return wrong("pieces", format!("{sum} bytes a slot"), accepted);
            }
            _ => {}
        }
        self.check_apart()
    }

    fn check_piece(&self, index: usize, piece: &Piece, bytes: u64) -> Result<(), WireError> {
        let wrong = |field: &str, value: u64, accepted: String| {
            let field = format!("geometry.pieces[{index}]{field}");
            Err(WireError::field(field, value, accepted))
        };
        if piece.rows == 0 || piece.rows > ROWS_MAX {
            return wrong(".rows", piece.rows.into(), format!("1 to {ROWS_MAX}"));
        }
        if piece.row_bytes == 0 || piece.row_bytes > BLOCK_BYTES_MAX.get() {
            return wrong(
                ".row_bytes",
                piece.row_bytes,
                format!("1 B to {BLOCK_BYTES_MAX}"),
            );
        }
        if piece.rows > 1 && piece.row_stride < piece.row_bytes {
            let least = piece.row_bytes;
            return wrong(
                ".row_stride",
                piece.row_stride,
                format!("at least {least}, a row"),
            );
        }
        if !piece.apart(self.slots) {
            let accepted = "slots that lie one behind the other, or take turns row by row";
            return wrong(".slot_stride", piece.slot_stride, accepted.into());
        }
        match piece.end(self.slots) {
            Some(end) if end <= bytes => Ok(()),
            end => {
                let field = format!("geometry.pieces[{index}]");
                let end = end.map_or_else(|| "beyond 2^64".into(), |end| format!("{end}"));
                let value = format!("a piece whose last slot ends at byte {end}");
                let accepted = format!("an end within the region's {}", Bytes(bytes));
                Err(WireError::field(field, value, accepted))
            }
        }
    }

    /// No two rows of slot 0 share a byte.
    fn check_apart(&self) -> Result<(), WireError> {
        let rows = self.pieces.iter().enumerate().flat_map(|(index, piece)| {
            let row = move |row: u32| (piece.offset + u64::from(row) * piece.row_stride, index);
            (0..piece.rows).map(row)
        });
        let mut rows: Vec<(u64, usize)> = rows.collect();
        rows.sort_unstable();
        let mut before: Option<(u64, usize)> = None;
        for (start, index) in rows {
            if let Some((_, other)) = before.filter(|(end, _)| *end > start) {
                let field = format!("geometry.pieces[{index}]");
                let value = format!("a piece that shares bytes with pieces[{other}]");
                return Err(WireError::field(
                    field,
                    value,
                    "pieces apart from each other",
                ));
            }
            let len = self.pieces.get(index).map_or(0, |piece| piece.row_bytes);
            before = Some((start.saturating_add(len), index));
        }
        Ok(())
    }

    /// The bytes of a slot of a geometry that was checked, in the order of the payload; rows that
    /// touch are one run.
    pub fn runs(&self, slot: u32) -> impl Iterator<Item = Run> + '_ {
        let mut from = 0;
        let runs = self.pieces.iter().flat_map(move |piece| {
            let start = u64::from(slot).saturating_mul(piece.slot_stride);
            let start = start.saturating_add(piece.offset);
            let touch = piece.row_stride == piece.row_bytes;
            let (runs, len) = match touch {
                true => (1, piece.bytes().unwrap_or_default()),
                false => (piece.rows, piece.row_bytes),
            };
            (0..runs).map(move |run| {
                let behind = u64::from(run).saturating_mul(piece.row_stride);
                (start.saturating_add(behind), len)
            })
        });
        runs.map(move |(at, len)| {
            let len = usize::try_from(len).unwrap_or_default();
            let run = Run { at, from, len };
            from += len;
            run
        })
    }
}

impl From<&RegionGeometry> for v1::RegionGeometry {
    fn from(geometry: &RegionGeometry) -> Self {
        let piece = |piece: &Piece| v1::RegionPiece {
            offset: piece.offset,
            slot_stride: piece.slot_stride,
            rows: piece.rows,
            row_bytes: piece.row_bytes,
            row_stride: piece.row_stride,
        };
        Self {
            kind: v1::PayloadKind::from(geometry.kind).into(),
            slots: geometry.slots,
            pieces: geometry.pieces.iter().map(piece).collect(),
        }
    }
}

/// What the companion socket answers to the descriptor of an engine's region: one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, strum::EnumIter)]
#[repr(u8)]
pub enum Handover {
    /// The ticket is unknown, shown before, another user's or too old; or its session has ended.
    #[error("the daemon refused the ticket")]
    Refused = 0,
    /// It is the region's from now on.
    #[error("taken")]
    Taken = 1,
    /// No descriptor came with the ticket.
    #[error("no descriptor came; accepted: exactly one beside the ticket")]
    Missing = 2,
    /// It is not memory of small pages, where no copy can hang or fault.
    #[error("not a file in memory; accepted: a memfd or a file on tmpfs, of small pages")]
    NotMemory = 3,
    /// It cannot be read and written.
    #[error("not open for reading and writing; accepted: O_RDWR, without O_APPEND and O_DIRECT")]
    NotWritable = 4,
    /// Its seals keep the daemon from writing.
    #[error("sealed against writing; accepted: no F_SEAL_WRITE and no F_SEAL_FUTURE_WRITE")]
    Sealed = 5,
    /// It is smaller than the region is to be.
    #[error("smaller than the region; accepted: at least the bytes that were registered")]
    TooSmall = 6,
    /// It could not be looked at or mapped.
    #[error("the daemon could not map it")]
    Unmapped = 7,
}

impl Handover {
    /// Reads the byte of an answer.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use strum::IntoEnumIterator;
        Self::iter().find(|answer| *answer as u8 == byte)
    }
}

#[cfg(test)]
mod tests;
