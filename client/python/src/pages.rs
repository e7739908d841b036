//! An engine's paged KV cache: which bytes of it are which part of a block.
//!
//! Upstairs:   `slot` gathers, `block` scatters, `saving` and `restoring` do both in bulk.
//! Downstairs: `memory`, which copies runs of bytes.
//!
//! A block of kvtier is one page of the engine or several. Where rows of tokens are the outermost
//! order, pages follow each other in the payload; where heads are, each head's rows of one page
//! follow those of the page before.
//!
//! Invariants kept here
//!   H1  Every byte of a part is copied exactly once, or nothing of the part is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_client::{
    BlockLayout, ModelDescriptor as Descriptor, Part, PartCode, PartOrder, PayloadKind,
};
use pyo3::prelude::*;

use crate::errors;
use crate::memory::array::numbers;
use crate::memory::{Array, Dim};
use crate::model::ModelDescriptor;
use crate::words::{self, Word};

/// Bytes in row-major order: dimensions around runs without gaps.
pub(crate) struct Runs {
    dims: Vec<Dim>,
    run: usize,
}

impl Runs {
    pub(crate) fn new(dims: &[Dim], itemsize: usize) -> Self {
        let (mut dims, mut run) = (dims.to_vec(), itemsize);
        while let Some(last) = dims.last() {
            if last.count != 1 && last.stride != run {
                break;
            }
            run *= last.count;
            dims.pop();
        }
        Self { dims, run }
    }

    /// Calls `copy` with the place in the array, the place in the payload and the length of each
    /// run. False as soon as one copy is.
    pub(crate) fn each(
        &self,
        array: usize,
        payload: usize,
        copy: &mut dyn FnMut(usize, usize, usize) -> bool,
    ) -> bool {
        walk(&self.dims, self.run, array, payload, copy)
    }
}

fn walk(
    dims: &[Dim],
    run: usize,
    array: usize,
    payload: usize,
    copy: &mut dyn FnMut(usize, usize, usize) -> bool,
) -> bool {
    let Some((dim, rest)) = dims.split_first() else {
        return copy(array, payload, run);
    };
    let inner = rest.iter().fold(run, |size, dim| size * dim.count);
    (0..dim.count).all(|at| {
        walk(
            rest,
            run,
            array + at * dim.stride,
            payload + at * inner,
            copy,
        )
    })
}

/// How the pages of a part make up its payload.
enum Order {
    /// Rows of tokens, page after page: `heads` is 1, or the outermost order.
    Rows { heads: Dim, row: Dim },
    /// Bytes only the engine understands, page after page.
    Whole,
    /// What stands at the end of the block: of the last page alone.
    Last,
}

/// The array that holds one part of all pages.
pub(crate) struct Source {
    array: Arc<Array>,
    page: Dim,
    order: Order,
    /// What one row holds, or all of a page where it has none.
    inner: Runs,
    /// Payload bytes of that.
    bytes: usize,
}

impl Source {
    /// Checks an array against a part of a full block that has `pages` pages of `page_tokens`.
    fn new(
        array: Arc<Array>,
        part: &Part,
        order: PartOrder,
        page_tokens: usize,
        pages: usize,
    ) -> PyResult<Self> {
        let Some((page, dims)) = array.dims.split_first() else {
            return Err(errors::invalid(
                "an array without dimensions; accepted: pages first",
            ));
        };
        let (page, size) = (*page, |dims: &[Dim]| {
            dims.iter()
                .fold(array.itemsize, |size, dim| size * dim.count)
        });
        let heads = usize::try_from(part.heads).unwrap_or(usize::MAX);
        let rows = usize::try_from(part.rows).unwrap_or(usize::MAX).max(1);
        let by_head =
            order == PartOrder::HeadMajor && matches!(part.code, PartCode::K | PartCode::V);
        let (order, inner, bytes, wanted) = match part.code {
            PartCode::Opaque => (Order::Whole, dims, part.len / pages, vec![]),
            PartCode::State => (Order::Last, dims, part.len, vec![]),
            _ if by_head => {
                let (outer, inner) = dims.split_at(dims.len().min(2));
                let order = match outer {
                    [heads, row] => Order::Rows {
                        heads: *heads,
                        row: *row,
                    },
                    _ => Order::Whole,
                };
                (
                    order,
                    inner,
                    part.len / rows / heads.max(1),
                    vec![heads, page_tokens],
                )
            }
            _ => {
                let (outer, inner) = dims.split_at(dims.len().min(1));
                let heads = Dim {
                    count: 1,
                    stride: 0,
                };
                let order = match outer {
                    [row] => Order::Rows { heads, row: *row },
                    _ => Order::Whole,
                };
                (order, inner, part.len / rows, vec![page_tokens])
            }
        };
        let leading = dims.iter().map(|dim| dim.count).take(wanted.len());
        if !leading.eq(wanted.iter().copied()) || size(inner) != bytes {
            let given: Vec<_> = array.dims.iter().map(|dim| dim.count).collect();
            let itemsize = array.itemsize;
            return Err(errors::invalid(format!(
                "an array of shape {given:?}, {itemsize} bytes an item; accepted: pages, then \
                 {wanted:?}, then {bytes} bytes in the order of the payload"
            )));
        }
        let inner = Runs::new(inner, array.itemsize);
        Ok(Self {
            array,
            page,
            order,
            inner,
            bytes,
        })
    }

    /// Calls `copy` for each run of a part of `tokens` tokens that lies in `pages`.
    fn each(
        &self,
        pages: &[usize],
        tokens: usize,
        page_tokens: usize,
        copy: &mut dyn FnMut(usize, usize, usize) -> bool,
    ) -> bool {
        let place = |page: usize| page * self.page.stride;
        match self.order {
            Order::Whole => pages
                .iter()
                .enumerate()
                .all(|(index, page)| self.inner.each(place(*page), index * self.bytes, copy)),
            Order::Last => {
                let last = pages.last();
                last.is_some_and(|page| self.inner.each(place(*page), 0, copy))
            }
            Order::Rows { heads, row } => (0..heads.count).all(|head| {
                pages.iter().enumerate().all(|(index, page)| {
                    let first = index * page_tokens;
                    let rows = tokens.saturating_sub(first).min(page_tokens);
                    let array = place(*page) + head * heads.stride;
                    let payload = (head * tokens + first) * self.bytes;
                    self.rows(rows, row.stride, array, payload, copy)
                })
            }),
        }
    }

    /// Rows of one page: in one run where nothing lies between them.
    fn rows(
        &self,
        rows: usize,
        stride: usize,
        array: usize,
        payload: usize,
        copy: &mut dyn FnMut(usize, usize, usize) -> bool,
    ) -> bool {
        if self.inner.dims.is_empty() && stride == self.bytes {
            return copy(array, payload, rows * self.bytes);
        }
        (0..rows).all(|row| {
            let payload = payload + row * self.bytes;
            self.inner.each(array + row * stride, payload, copy)
        })
    }
}

/// The arrays of a cache at one moment.
#[derive(Clone)]
pub(crate) struct Cache {
    pub(crate) model: Arc<Descriptor>,
    pub(crate) kind: PayloadKind,
    page_tokens: usize,
    pages_per_block: usize,
    sources: HashMap<(u32, PartCode), Arc<Source>>,
    /// Whose turn it is to save (Q3).
    pub(crate) turn: Arc<tokio::sync::Mutex<()>>,
}

impl Cache {
    fn source(&self, part: &Part) -> Option<&Source> {
        self.sources
            .get(&(part.layer, part.code))
            .map(AsRef::as_ref)
    }

    /// Pages that a block of so many tokens has.
    fn pages_of(&self, tokens: u32) -> usize {
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
        tokens.div_ceil(self.page_tokens)
    }

    /// Copies a part out of the engine's pages. False when the array does not have them.
    pub(crate) fn gather(&self, part: &Part, pages: &[usize], tokens: u32, to: &mut [u8]) -> bool {
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
        self.source(part).is_some_and(|source| {
            source.each(
                pages,
                tokens,
                self.page_tokens,
                &mut |array, payload, len| {
                    let place = payload
                        .checked_add(len)
                        .and_then(|end| to.get_mut(payload..end));
                    place.is_some_and(|place| source.array.read(array, place))
                },
            )
        })
    }

    /// Copies a part to the engine's pages. False when the array does not have them.
    pub(crate) fn scatter(&self, part: &Part, pages: &[usize], tokens: u32, from: &[u8]) -> bool {
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
        self.source(part).is_some_and(|source| {
            source.each(
                pages,
                tokens,
                self.page_tokens,
                &mut |array, payload, len| {
                    let place = payload
                        .checked_add(len)
                        .and_then(|end| from.get(payload..end));
                    place.is_some_and(|place| source.array.write(array, place))
                },
            )
        })
    }

    /// Pages of one block of `tokens` tokens, from a list that names them. Errors: as `split`.
    pub(crate) fn split_one(
        &self,
        pages: &Bound<'_, PyAny>,
        tokens: u32,
        writing: bool,
    ) -> PyResult<Vec<usize>> {
        let pages = numbers("pages", pages)?;
        let split = self.split(pages, 1, writing)?;
        let pages = split.first().map_or(&[][..], Vec::as_slice);
        self.pages_for(pages, tokens).map(<[usize]>::to_vec)
    }

    /// Pages of a block of `tokens` tokens: as many as it has of those that were named.
    /// Errors: `Invalid` when they are fewer.
    pub(crate) fn pages_for<'a>(&self, pages: &'a [usize], tokens: u32) -> PyResult<&'a [usize]> {
        let wanted = self.pages_of(tokens);
        pages.get(..wanted).ok_or_else(|| {
            let given = pages.len();
            errors::invalid(format!(
                "{given} pages for a block of {tokens} tokens; accepted: {wanted}"
            ))
        })
    }

    /// Which of the named pages are those of each block. Checks that each array has them.
    ///
    /// Errors: `Invalid` when pages are too few, too many or not there, an array is missing, or
    /// one that is to be written is read-only.
    pub(crate) fn split(
        &self,
        pages: Vec<usize>,
        blocks: usize,
        writing: bool,
    ) -> PyResult<Vec<Vec<usize>>> {
        self.check(writing)?;
        let each = self.pages_per_block;
        let (least, most) = (blocks.saturating_sub(1) * each, blocks * each);
        if pages.len() <= least || pages.len() > most {
            let given = pages.len();
            return Err(errors::invalid(format!(
                "{given} pages for {blocks} blocks; accepted: {each} for each, the last block 1 or \
                 more"
            )));
        }
        let there = self.pages();
        if let Some(page) = pages.iter().find(|page| **page >= there) {
            return Err(errors::invalid(format!(
                "page {page}; accepted: below {there}"
            )));
        }
        Ok(pages.chunks(each).map(<[usize]>::to_vec).collect())
    }

    fn check(&self, writing: bool) -> PyResult<()> {
        if let Some((layer, code)) = self.missing()?.first() {
            let code = words::code(*code);
            return Err(errors::invalid(format!(
                "no array holds {code} of layer {layer}"
            )));
        }
        let fixed = self
            .sources
            .iter()
            .find(|(_, source)| !source.array.writable);
        if let (true, Some(((layer, code), _))) = (writing, fixed) {
            let code = words::code(*code);
            return Err(errors::invalid(format!(
                "the array of {code} of layer {layer} is read-only"
            )));
        }
        Ok(())
    }

    fn layout(&self) -> PyResult<BlockLayout> {
        let layout = BlockLayout::new(&self.model, self.kind, self.model.block_tokens);
        layout.map_err(|error| errors::invalid(error.to_string()))
    }

    fn missing(&self) -> PyResult<Vec<(u32, PartCode)>> {
        let layout = self.layout()?;
        let parts = layout.parts().iter().map(|part| (part.layer, part.code));
        Ok(parts
            .filter(|part| !self.sources.contains_key(part))
            .collect())
    }

    /// Pages that every array has.
    fn pages(&self) -> usize {
        let counts = self.sources.values().map(|source| source.page.count);
        counts.min().unwrap_or_default()
    }
}

/// An engine's paged KV cache: where the parts of each page lie.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct PagedCache(Mutex<Arc<Cache>>);

impl PagedCache {
    /// The arrays as they are now.
    pub(crate) fn now(&self) -> Arc<Cache> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl PagedCache {
    #[new]
    #[pyo3(signature = (model, page_tokens, *, kind="kv"))]
    fn new(model: &Bound<'_, ModelDescriptor>, page_tokens: u32, kind: &str) -> PyResult<Self> {
        let model = Arc::clone(&model.get().0);
        let block = model.block_tokens;
        if page_tokens == 0 || !block.is_multiple_of(page_tokens) {
            return Err(errors::invalid(format!(
                "page_tokens is {page_tokens}; accepted: a divisor of block_tokens, {block}"
            )));
        }
        let cache = Cache {
            model,
            kind: PayloadKind::read(kind)?,
            page_tokens: usize::try_from(page_tokens)?,
            pages_per_block: usize::try_from(block / page_tokens)?,
            sources: HashMap::new(),
            turn: Arc::default(),
        };
        cache.layout()?;
        Ok(Self(Mutex::new(Arc::new(cache))))
    }

    /// Names the array that holds a part of all pages: its first dimension is the page, the others
    /// are the page's part in the order of the payload, with whatever strides.
    fn add(&self, layer: u32, code: &str, array: &Bound<'_, PyAny>) -> PyResult<()> {
        let code = PartCode::read(code)?;
        let memory = crate::memory::array::array(array)?;
        let cache = self.now();
        let layout = cache.layout()?;
        let part = layout.part(layer, code).ok_or_else(|| {
            let code = words::code(code);
            errors::invalid(format!("layer {layer} of a block has no part {code:?}"))
        })?;
        let (tokens, pages) = (cache.page_tokens, cache.pages_per_block);
        let source = Source::new(memory, part, cache.model.order, tokens, pages)?;
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut now)
            .sources
            .insert((layer, code), Arc::new(source));
        Ok(())
    }

    /// Parts that no array was named for.
    fn missing(&self) -> PyResult<Vec<(u32, &'static str)>> {
        let missing = self.now().missing()?.into_iter();
        Ok(missing
            .map(|(layer, code)| (layer, words::code(code)))
            .collect())
    }

    #[getter]
    fn page_tokens(&self) -> usize {
        self.now().page_tokens
    }

    #[getter]
    fn pages_per_block(&self) -> usize {
        self.now().pages_per_block
    }

    /// Pages that every array has.
    #[getter]
    fn pages(&self) -> usize {
        self.now().pages()
    }

    fn __repr__(&self) -> String {
        let cache = self.now();
        let (arrays, pages) = (cache.sources.len(), cache.pages());
        format!("PagedCache({arrays} arrays of {pages} pages)")
    }
}
