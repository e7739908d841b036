//! A restored block, read in place for as long as its lease is held.
//!
//! Upstairs:   `restore` hands these out, `session` confirms their release.
//! Downstairs: `memory` holds the lease.

use std::ffi::c_int;
use std::sync::Arc;

use kvtier_client::{BlockKey, Level, PartCode, PartOrder, Quality, ReadError, Tier};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::array::array;
use super::view::{self, View};
use super::{Exposed, Held};
use crate::errors;
use crate::keys;
use crate::model::{BlockLayout, shape_of};
use crate::pages::{PagedCache, Runs};
use crate::slot::chosen;
use crate::words::{self, Word};

/// A restored block, read in place.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct LeasedBlock {
    place: Arc<Exposed>,
    index: usize,
    key: BlockKey,
    tier: Tier,
    level: Level,
    quality: Quality,
    layout: BlockLayout,
}

/// Takes the blocks themselves, all or none.
pub(crate) fn take_all(blocks: &Bound<'_, PyTuple>) -> PyResult<Vec<kvtier_client::LeasedBlock>> {
    let blocks = blocks.iter().map(|block| block.cast_into::<LeasedBlock>());
    let blocks: Vec<Bound<'_, LeasedBlock>> = blocks.collect::<Result<_, _>>()?;
    let mut taken = Vec::with_capacity(blocks.len());
    for block in &blocks {
        match block.get().place.take() {
            Ok(Held::Block(held)) => taken.push(held),
            Ok(other @ Held::Slot(_)) => block.get().place.put_back(other),
            Err(error) => {
                for (block, held) in blocks.iter().zip(taken) {
                    block.get().place.put_back(Held::Block(held));
                }
                return Err(error);
            }
        }
    }
    Ok(taken)
}

impl LeasedBlock {
    pub(crate) fn new(block: kvtier_client::LeasedBlock, order: PartOrder) -> PyResult<Self> {
        let (index, key, tier) = (block.index(), block.key(), block.tier());
        let (level, quality) = (block.level(), block.quality());
        let layout = BlockLayout {
            layout: Arc::new(block.layout().clone()),
            order,
        };
        let place = Exposed::block(block)?;
        Ok(Self {
            place,
            index,
            key,
            tier,
            level,
            quality,
            layout,
        })
    }

    /// Copies `len` bytes out to an array, in row-major order.
    fn copy_out(
        &self,
        py: Python<'_>,
        target: &Bound<'_, PyAny>,
        at: usize,
        len: usize,
    ) -> PyResult<()> {
        let target = array(target)?;
        if target.nbytes() != len || !target.writable {
            let (given, kind) = (
                target.nbytes(),
                if target.writable { "" } else { "read-only " },
            );
            return Err(errors::invalid(format!(
                "a {kind}target of {given} bytes; accepted: one to write of exactly {len}"
            )));
        }
        let place = self.place.begin()?;
        let runs = Runs::new(&target.dims, target.itemsize);
        py.detach(|| {
            let from = place.bytes().and_then(|bytes| bytes.get(at..at + len));
            runs.each(0, 0, &mut |array, payload, len| {
                let from = from.and_then(|from| from.get(payload..payload + len));
                from.is_some_and(|from| target.write(array, from))
            });
        });
        place.confirm()
    }
}

#[pymethods]
impl LeasedBlock {
    /// Index into the keys of the restore.
    #[getter]
    fn index(&self) -> usize {
        self.index
    }

    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        keys::bytes(py, &self.key)
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.layout.layout.tokens()
    }

    #[getter]
    fn tier(&self) -> &'static str {
        words::tier(self.tier)
    }

    #[getter]
    fn level(&self) -> u8 {
        self.level.0
    }

    /// How good it is: the worse of its level and of what it was computed from.
    #[getter]
    fn quality(&self) -> &'static str {
        words::quality(self.quality)
    }

    #[getter]
    fn layout(&self) -> BlockLayout {
        self.layout.again()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.place.len()
    }

    fn part(&self, layer: u32, code: &str) -> PyResult<View> {
        let code = PartCode::read(code)?;
        let part = self.layout.layout.part(layer, code);
        let part =
            part.ok_or_else(|| errors::raise(ReadError::NoSuchPart { layer, code }.into()))?;
        let shape = shape_of(part, self.layout.order);
        Ok(View::new(
            &self.place,
            part.offset,
            part.len,
            shape,
            part.element,
        ))
    }

    /// All parts of one layer, back to back, as bytes.
    fn page(&self, layer: u32) -> PyResult<View> {
        let page = self.layout.layout.page(layer);
        let page = page.ok_or_else(|| errors::raise(ReadError::NoSuchPage { layer }.into()))?;
        Ok(View::bytes(&self.place, page.start, page.len()))
    }

    fn payload(&self) -> View {
        View::bytes(&self.place, 0, self.place.len())
    }

    /// Copies the parts of these layers (all) to the engine's pages.
    #[pyo3(signature = (cache, pages, layers=None))]
    fn scatter(
        &self,
        py: Python<'_>,
        cache: &Bound<'_, PagedCache>,
        pages: &Bound<'_, PyAny>,
        layers: Option<Vec<u32>>,
    ) -> PyResult<()> {
        let cache = cache.get().now();
        let tokens = self.layout.layout.tokens();
        let pages = cache.split_one(pages, tokens, true)?;
        let parts = chosen(&self.layout.layout, layers)?;
        let place = self.place.begin()?;
        let copied = py.detach(|| {
            let bytes = place.bytes().unwrap_or_default();
            parts.iter().all(|part| {
                let from = bytes.get(part.offset..part.offset + part.len);
                from.is_some_and(|from| cache.scatter(part, &pages, tokens, from))
            })
        });
        if !copied {
            return Err(errors::invalid(
                "the cache is of another model than the block",
            ));
        }
        place.confirm()
    }

    fn copy_part(
        &self,
        py: Python<'_>,
        layer: u32,
        code: &str,
        target: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let code = PartCode::read(code)?;
        let part = self.layout.layout.part(layer, code);
        let part =
            part.ok_or_else(|| errors::raise(ReadError::NoSuchPart { layer, code }.into()))?;
        self.copy_out(py, target, part.offset, part.len)
    }

    fn copy(&self, py: Python<'_>, target: &Bound<'_, PyAny>) -> PyResult<()> {
        self.copy_out(py, target, 0, self.place.len())
    }

    /// Raises `BufferError` while a view is in use. `Session.release` confirms it.
    fn release(&self) -> PyResult<()> {
        self.place.take().map(drop)
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let place = &slf.get().place;
        let (of, len) = (place.begin()?, place.len());
        // SAFETY: `view` is the one that the interpreter asks to be filled.
        unsafe { view::fill(view, flags, slf.into_any(), of, 0, len) }
    }

    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `view` was filled by `__getbuffer__`.
        unsafe { view::release(view) };
    }

    fn __repr__(&self) -> String {
        let (index, nbytes, tier) = (self.index, self.place.len(), words::tier(self.tier));
        format!("LeasedBlock(index={index}, tier={tier:?}, nbytes={nbytes})")
    }
}
