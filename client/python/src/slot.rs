//! A slot: a place for one block, filled from Python or from the engine's arrays.
//!
//! Upstairs:   `session` reserves and commits slots.
//! Downstairs: `memory` holds the bytes, the SDK's `ReservedSlot` which parts are written.

use std::sync::Arc;

use kvtier_client::{FillError, Part, PartCode, PartOrder, ReservedSlot};
use pyo3::prelude::*;

use crate::errors;
use crate::memory::array::array;
use crate::memory::view::View;
use crate::memory::{Exposed, Held};
use crate::model::{BlockLayout, shape_of};
use crate::pages::{PagedCache, Runs};
use crate::save::SaveBlock;
use crate::words::{self, Word};

/// A place for one block, to fill and commit. Dropping it gives the place back.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Slot {
    place: Arc<Exposed>,
    block: kvtier_client::SaveBlock,
    layout: BlockLayout,
}

/// What a `with` fills: one part, or all of them.
type Filled = Option<(u32, PartCode)>;

impl Slot {
    pub(crate) fn new(slot: ReservedSlot, order: PartOrder) -> Self {
        let block = *slot.block();
        let layout = BlockLayout {
            layout: Arc::new(slot.layout().clone()),
            order,
        };
        let place = Exposed::slot(slot);
        Self {
            place,
            block,
            layout,
        }
    }

    /// Takes the slot itself, when nothing shows it.
    pub(crate) fn take(&self) -> PyResult<ReservedSlot> {
        match self.place.take()? {
            Held::Slot(slot) => Ok(slot),
            other @ Held::Block(_) => {
                self.place.put_back(other);
                Err(errors::buffer("it is no slot"))
            }
        }
    }

    pub(crate) fn put_back(&self, slot: ReservedSlot) {
        self.place.put_back(Held::Slot(slot));
    }

    /// Parts that are not written yet.
    pub(crate) fn unwritten(&self) -> PyResult<Vec<(u32, PartCode)>> {
        self.place.with(|held| match held {
            Held::Slot(slot) => slot.missing(),
            Held::Block(_) => Vec::new(),
        })
    }

    fn part(&self, layer: u32, code: &str) -> PyResult<Part> {
        let code = PartCode::read(code)?;
        let part = self.layout.layout.part(layer, code).copied();
        part.ok_or_else(|| errors::raise(FillError::NoSuchPart { layer, code }.into()))
    }

    fn written(&self, parts: impl IntoIterator<Item = (u32, PartCode)>) -> PyResult<()> {
        let mut parts = parts.into_iter();
        let marked = self.place.with(|held| match held {
            Held::Slot(slot) => parts.try_for_each(|(layer, code)| slot.mark_written(layer, code)),
            Held::Block(_) => Ok(()),
        })?;
        marked.map_err(|error| errors::raise(error.into()))
    }

    /// Copies `len` bytes in from an array, in row-major order.
    fn copy_in(&self, source: &Bound<'_, PyAny>, at: usize, len: usize) -> PyResult<()> {
        let py = source.py();
        let source = array(source)?;
        if source.nbytes() != len {
            let given = source.nbytes();
            return Err(errors::invalid(format!(
                "{given} bytes; accepted: exactly {len}"
            )));
        }
        let place = self.place.begin()?;
        let runs = Runs::new(&source.dims, source.itemsize);
        py.detach(|| {
            place.write(at, len, |to| {
                runs.each(0, 0, &mut |array, payload, len| {
                    let to = to.get_mut(payload..payload + len);
                    to.is_some_and(|to| source.read(array, to))
                });
            });
        });
        Ok(())
    }

    fn everything(&self) -> Vec<(u32, PartCode)> {
        let parts = self.layout.layout.parts().iter();
        parts.map(|part| (part.layer, part.code)).collect()
    }
}

#[pymethods]
impl Slot {
    #[getter]
    fn block(&self) -> SaveBlock {
        SaveBlock(self.block)
    }

    #[getter]
    fn layout(&self) -> BlockLayout {
        self.layout.again()
    }

    /// Parts that are not written yet.
    fn missing(&self) -> PyResult<Vec<(u32, &'static str)>> {
        let missing = self.unwritten()?.into_iter();
        Ok(missing
            .map(|(layer, code)| (layer, words::code(code)))
            .collect())
    }

    /// Copies the parts of these layers (all) out of the engine's pages.
    #[pyo3(signature = (cache, pages, layers=None))]
    fn gather(
        &self,
        py: Python<'_>,
        cache: &Bound<'_, PagedCache>,
        pages: &Bound<'_, PyAny>,
        layers: Option<Vec<u32>>,
    ) -> PyResult<()> {
        let cache = cache.get().now();
        let tokens = self.block.tokens;
        let pages = cache.split_one(pages, tokens, false)?;
        let parts = chosen(&self.layout.layout, layers)?;
        let place = self.place.begin()?;
        let copied = py.detach(|| {
            parts.iter().all(|part| {
                let mut done = false;
                place.write(part.offset, part.len, |to| {
                    done = cache.gather(part, &pages, tokens, to);
                });
                done
            })
        });
        if !copied {
            return Err(errors::invalid(
                "the cache is of another model than the slot",
            ));
        }
        self.written(parts.iter().map(|part| (part.layer, part.code)))
    }

    /// Copies one part in: an array of the part's bytes, in row-major order.
    fn write_part(&self, layer: u32, code: &str, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let part = self.part(layer, code)?;
        self.copy_in(source, part.offset, part.len)?;
        self.written([(part.layer, part.code)])
    }

    /// Copies the whole payload in.
    fn write(&self, source: &Bound<'_, PyAny>) -> PyResult<()> {
        self.copy_in(source, 0, self.place.len())?;
        self.written(self.everything())
    }

    /// Lets the caller write one part in place, all of it.
    fn fill_part(slf: Bound<'_, Self>, layer: u32, code: &str) -> PyResult<Filling> {
        let part = slf.get().part(layer, code)?;
        let filled = Some((part.layer, part.code));
        let slot = slf.unbind();
        Ok(Filling { slot, filled })
    }

    /// Lets the caller write the whole payload in place.
    fn fill(slf: Bound<'_, Self>) -> Filling {
        let slot = slf.unbind();
        Filling { slot, filled: None }
    }

    /// Gives the place back. Raises `BufferError` while a view is in use.
    fn release(&self) -> PyResult<()> {
        self.place.take().map(drop)
    }

    fn __repr__(&self) -> String {
        let (key, tokens) = (self.block.key.short(), self.block.tokens);
        format!(
            "Slot({key}.., tokens={tokens}, nbytes={})",
            self.place.len()
        )
    }
}

/// Parts of these layers, or of all.
pub(crate) fn chosen(
    layout: &kvtier_client::BlockLayout,
    layers: Option<Vec<u32>>,
) -> PyResult<Vec<Part>> {
    let Some(layers) = layers else {
        return Ok(layout.parts().to_vec());
    };
    let mut parts = Vec::new();
    for layer in layers {
        let before = parts.len();
        parts.extend(layout.parts().iter().filter(|part| part.layer == layer));
        if parts.len() == before {
            return Err(errors::raise(FillError::NoSuchPage { layer }.into()));
        }
    }
    Ok(parts)
}

/// `with slot.fill_part(0, "k") as view`: counts as written when the body ends well.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Filling {
    slot: Py<Slot>,
    filled: Filled,
}

#[pymethods]
impl Filling {
    fn __enter__(&self) -> PyResult<View> {
        let slot = self.slot.get();
        let Some((layer, code)) = self.filled else {
            return Ok(View::bytes(&slot.place, 0, slot.place.len()));
        };
        let part = slot.part(layer, words::code(code))?;
        let shape = shape_of(&part, slot.layout.order);
        Ok(View::new(
            &slot.place,
            part.offset,
            part.len,
            shape,
            part.element,
        ))
    }

    #[pyo3(signature = (kind, error, trace, /))]
    fn __exit__(
        &self,
        kind: Option<Bound<'_, PyAny>>,
        error: Option<Bound<'_, PyAny>>,
        trace: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let _ = (error, trace);
        if kind.is_some() {
            return Ok(());
        }
        let slot = self.slot.get();
        match self.filled {
            Some(part) => slot.written([part]),
            None => slot.written(slot.everything()),
        }
    }
}
