//! Memory that is not ours: the engine's arrays, and the bytes of slots and leases that Python
//! may see. A room with unsafe code.
//!
//! Upstairs:   `pages` and `slot` copy between the two; `view` and `dlpack` show the second.
//! Downstairs: raw pointers.
//!
//! Whoever names an array lends its memory: kvtier reads a source until the copy is done, and
//! writes a target until then. What the engine does to that memory meanwhile is the engine's
//! business, as it is with every library that takes a buffer and gives the interpreter free.
//!
//! Invariants kept here
//!   A1  No access leaves the bytes that the array's shape and strides span.
//!   A2  The bytes of a slot or a lease are neither handed over nor released while anything shows
//!       or copies them: each such use is counted, and taking them asks for a count of zero.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvtier_client::{Error, LeasedBlock, ReservedSlot};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use crate::errors;
use crate::runtime::Here;

pub(crate) mod array;
pub(crate) mod block;
mod dlpack;
pub(crate) mod view;

/// What keeps an array's memory there.
pub(crate) enum Keeper {
    /// A buffer of Python's protocol; its exporter keeps the memory until it is released.
    #[expect(dead_code, reason = "released when dropped")]
    Buffer(PyUntypedBuffer),
    /// A DLPack capsule that nobody consumes, or what the caller says owns the address.
    #[expect(dead_code, reason = "released when dropped")]
    Object(Py<PyAny>),
    /// The caller's word.
    Nothing,
}

/// One dimension of an array. Units: elements, and bytes from one to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dim {
    pub(crate) count: usize,
    pub(crate) stride: usize,
}

/// Memory of the engine.
pub(crate) struct Array {
    base: *mut u8,
    /// Bytes from the first to behind the last element, gaps included.
    span: usize,
    pub(crate) dims: Vec<Dim>,
    pub(crate) itemsize: usize,
    pub(crate) writable: bool,
    _keeper: Keeper,
}

// SAFETY: an array is an address range and what keeps it there.
//   Live    `keeper` holds the exporter, which may be dropped on any thread.
//   Stable  the range is fixed when the array is made.
//   Alone   accesses are copies of bytes; their order is the lender's business (see above).
//   Drop    buffers and objects find their way back to the interpreter from any thread.
unsafe impl Send for Array {}
// SAFETY: as above: nothing in it changes after it was made.
//   Live    as above.
//   Stable  as above.
//   Alone   as above.
//   Drop    as above.
unsafe impl Sync for Array {}

impl Array {
    /// An array at `base`. Errors: `Invalid` for a span that is larger than memory, or memory
    /// at no address.
    pub(crate) fn new(
        base: *mut u8,
        dims: Vec<Dim>,
        itemsize: usize,
        writable: bool,
        keeper: Keeper,
    ) -> PyResult<Self> {
        let mut last = Some(itemsize);
        for dim in &dims {
            let reach = dim.count.saturating_sub(1).checked_mul(dim.stride);
            last = last
                .zip(reach)
                .and_then(|(last, reach)| last.checked_add(reach));
        }
        let empty = dims.iter().any(|dim| dim.count == 0);
        let span = if empty { Some(0) } else { last };
        let fits = |span: &usize| *span <= isize::MAX.unsigned_abs();
        let span = span.filter(fits);
        let span = span.ok_or_else(|| errors::invalid("the array is larger than memory"))?;
        if span > 0 && base.is_null() {
            return Err(errors::invalid("the array has no address"));
        }
        Ok(Self {
            base,
            span,
            dims,
            itemsize,
            writable,
            _keeper: keeper,
        })
    }

    pub(crate) fn address(&self) -> usize {
        self.base.addr()
    }

    /// Bytes of the elements, gaps left out.
    pub(crate) fn nbytes(&self) -> usize {
        let counts = self.dims.iter().map(|dim| dim.count);
        counts.fold(self.itemsize, usize::saturating_mul)
    }

    /// Copies bytes out from `at`. False when they are not inside (A1); nothing is copied then.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) -> bool {
        if !self.has(at, to.len()) {
            return false;
        }
        // SAFETY: the pointer stays inside the array.
        //   Live    `keeper` holds the memory.
        //   Stable  `has` has checked `at` against the span, which the dimensions give.
        //   Alone   n/a: nothing is accessed through it here.
        //   Drop    n/a
        let from = unsafe { self.base.add(at) };
        // SAFETY: both ranges can be used for their length.
        //   Live    as above; `to` is borrowed.
        //   Stable  `has` has checked the end of the source.
        //   Alone   the two may overlap, which `copy` allows.
        //   Drop    n/a
        unsafe { std::ptr::copy(from, to.as_mut_ptr(), to.len()) };
        true
    }

    /// Copies bytes in from `at`. False when they are not inside (A1) or the array is read-only;
    /// nothing is copied then.
    pub(crate) fn write(&self, at: usize, from: &[u8]) -> bool {
        if !self.writable || !self.has(at, from.len()) {
            return false;
        }
        // SAFETY: the pointer stays inside the array, as in `read`.
        //   Live    `keeper` holds the memory.
        //   Stable  `has` has checked `at`.
        //   Alone   n/a: nothing is accessed through it here.
        //   Drop    n/a
        let to = unsafe { self.base.add(at) };
        // SAFETY: both ranges can be used for their length; the lender allows writing.
        //   Live    as above; `from` is borrowed.
        //   Stable  `has` has checked the end of the target.
        //   Alone   the two may overlap, which `copy` allows.
        //   Drop    n/a
        unsafe { std::ptr::copy(from.as_ptr(), to, from.len()) };
        true
    }

    fn has(&self, at: usize, len: usize) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.span)
    }
}

/// What holds bytes that Python may see.
pub(crate) enum Held {
    Slot(ReservedSlot),
    Block(LeasedBlock),
}

/// The bytes of a slot or a lease, and who uses them.
pub(crate) struct Exposed {
    start: NonNull<u8>,
    len: usize,
    writable: bool,
    held: Here<Mutex<Option<Held>>>,
    uses: AtomicUsize,
    /// One copy into a slot at a time.
    writing: Mutex<()>,
}

// SAFETY: an address range with its owner, and a count.
//   Live    `held` owns the range and may itself be sent.
//   Stable  a slot's or a lease's bytes do not move with the value that owns them.
//   Alone   Rust copies into a slot under `writing`; Python's writers answer for themselves.
//   Drop    `held` may be dropped anywhere.
unsafe impl Send for Exposed {}
// SAFETY: as above; everything that changes is behind a mutex or atomic.
//   Live    as above.
//   Stable  as above.
//   Alone   as above.
//   Drop    as above.
unsafe impl Sync for Exposed {}

impl Exposed {
    pub(crate) fn slot(mut slot: ReservedSlot) -> Arc<Self> {
        let len = slot.layout().payload_len();
        let start = NonNull::new(slot.as_mut_ptr()).unwrap_or(NonNull::dangling());
        Self::made(start, len, true, Held::Slot(slot))
    }

    /// Errors: `SessionLost` when the lease is lost already.
    pub(crate) fn block(block: LeasedBlock) -> PyResult<Arc<Self>> {
        let bytes = block
            .payload()
            .map_err(|error| errors::raise(error.into()))?;
        let (start, len) = (NonNull::from(bytes).cast(), bytes.len());
        Ok(Self::made(start, len, false, Held::Block(block)))
    }

    fn made(start: NonNull<u8>, len: usize, writable: bool, held: Held) -> Arc<Self> {
        Arc::new(Self {
            start,
            len,
            writable,
            held: Here::new(Mutex::new(Some(held))),
            uses: AtomicUsize::new(0),
            writing: Mutex::new(()),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    fn lock(&self) -> PyResult<MutexGuard<'_, Option<Held>>> {
        let held = self.held.get()?;
        Ok(held.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the owner. Errors: `BufferError` once it was taken, `Forked`.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Held) -> T) -> PyResult<T> {
        let looked = self.lock()?.as_mut().map(look);
        looked.ok_or_else(gone)
    }

    /// Begins a use, which lasts until the value is dropped (A2).
    /// Errors: `BufferError` when the owner was taken; `SessionLost` when the lease is lost.
    pub(crate) fn begin(self: &Arc<Self>) -> PyResult<Use> {
        let begun = self.with(|held| {
            let begun = alive(held);
            if begun.is_ok() {
                self.uses.fetch_add(1, Ordering::AcqRel);
            }
            begun
        })?;
        let of = Arc::clone(self);
        begun.map(|()| Use { of }).map_err(errors::raise)
    }

    /// Takes the owner away, when nobody uses the bytes (A2).
    /// Errors: `BufferError`; it stays then.
    pub(crate) fn take(&self) -> PyResult<Held> {
        let (uses, held) = {
            let mut held = self.lock()?;
            match self.uses.load(Ordering::Acquire) {
                0 => (0, held.take()),
                uses => (uses, None),
            }
        };
        if uses > 0 {
            let text = format!("{uses} views or copies of it are in use: drop them first");
            return Err(errors::buffer(text));
        }
        held.ok_or_else(gone)
    }

    /// Puts the owner back that `take` has given.
    pub(crate) fn put_back(&self, owner: Held) {
        if let Ok(mut held) = self.lock() {
            held.get_or_insert(owner);
        }
    }
}

fn gone() -> PyErr {
    errors::buffer("it was committed or released")
}

/// A lease may be lost; a slot is found out at the commit.
fn alive(held: &mut Held) -> Result<(), Error> {
    match held {
        Held::Slot(_) => Ok(()),
        Held::Block(block) => Ok(block.payload().map(|_| ())?),
    }
}

/// One use of the bytes: a view, a tensor, or a copy.
pub(crate) struct Use {
    of: Arc<Exposed>,
}

impl Use {
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.of.start
    }

    /// The bytes of a lease. `None` for a slot, which changes.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        if self.of.writable {
            return None;
        }
        // SAFETY: the bytes can be read and do not change under the slice.
        //   Live    this use keeps the lease from being taken (A2).
        //   Stable  the daemon does not write a leased slot; should it take the lease back, the
        //           caller finds out by `confirm`, as the SDK's own readers do.
        //   Alone   nobody writes a lease.
        //   Drop    the borrow of `self` ends before the use.
        Some(unsafe { std::slice::from_raw_parts(self.of.start.as_ptr(), self.of.len) })
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.of.writable
    }

    /// Looks once more whether the lease lived until now. Errors: `SessionLost`.
    pub(crate) fn confirm(&self) -> PyResult<()> {
        self.of.with(alive)?.map_err(errors::raise)
    }

    /// Lets `fill` write a range of a slot. False when there is none.
    pub(crate) fn write(&self, at: usize, len: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.of.len);
        if !self.of.writable || !inside {
            return false;
        }
        let _alone = self
            .of
            .writing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the pointer stays inside the slot.
        //   Live    this use keeps the slot from being taken (A2).
        //   Stable  the range was checked above.
        //   Alone   n/a: nothing is accessed through it here.
        //   Drop    n/a
        let start = unsafe { self.of.start.as_ptr().add(at) };
        // SAFETY: the bytes can be written for the time of the call.
        //   Live    as above.
        //   Stable  as above.
        //   Alone   `writing` is held; the slot itself is not touched through its own methods
        //           while a use lasts, except for its list of written parts.
        //   Drop    the slice ends with the call.
        fill(unsafe { std::slice::from_raw_parts_mut(start, len) });
        true
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.of.uses.fetch_sub(1, Ordering::AcqRel);
    }
}
