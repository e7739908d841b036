//! Arrays from whatever Python passes: buffers, DLPack tensors, addresses, lists of numbers.
//!
//! Upstairs:   `pages`, `slot` and `block` take sources and targets; `session` takes tokens.
//! Downstairs: the buffer protocol, `dlpack`.

use std::sync::Arc;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use super::{Array, Dim, Keeper, dlpack};
use crate::errors;

/// Memory at an address, as an array. `owner` is kept alive as long as kvtier may use it.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct Memory(Arc<Array>);

#[pymethods]
impl Memory {
    #[new]
    #[pyo3(signature = (address, shape, *, itemsize=1, strides=None, writable=true, owner=None))]
    fn new(
        address: usize,
        shape: Vec<usize>,
        itemsize: usize,
        strides: Option<Vec<isize>>,
        writable: bool,
        owner: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let dims = match strides {
            None => compact(&shape, itemsize),
            Some(strides) => strided(&shape, &strides)?,
        };
        let keeper = owner.map_or(Keeper::Nothing, Keeper::Object);
        let base = std::ptr::with_exposed_provenance_mut(address);
        let array = Array::new(base, dims, itemsize, writable, keeper)?;
        Ok(Self(Arc::new(array)))
    }

    #[getter]
    fn address(&self) -> usize {
        self.0.address()
    }

    /// Bytes of the elements, gaps left out.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    fn __repr__(&self) -> String {
        format!(
            "Memory({:#x}, nbytes={})",
            self.0.address(),
            self.0.nbytes()
        )
    }
}

/// The array that an argument is. Errors: `TypeError` for what lends no memory, `Invalid`.
pub(crate) fn array(object: &Bound<'_, PyAny>) -> PyResult<Arc<Array>> {
    if let Ok(memory) = object.cast::<Memory>() {
        return Ok(Arc::clone(&memory.get().0));
    }
    // Tensors of PyTorch have no buffer; read-only arrays of NumPy no legacy DLPack.
    if let Ok(buffer) = PyUntypedBuffer::get(object) {
        if buffer.suboffsets().is_some() {
            return Err(errors::invalid(
                "an array of pointers; accepted: one with strides",
            ));
        }
        let dims = strided(buffer.shape(), buffer.strides())?;
        let (base, itemsize) = (buffer.buf_ptr().cast(), buffer.item_size());
        let writable = !buffer.readonly();
        let array = Array::new(base, dims, itemsize, writable, Keeper::Buffer(buffer))?;
        return Ok(Arc::new(array));
    }
    let imported = dlpack::import(object)?;
    imported.map(Arc::new).ok_or_else(|| {
        let name = object.get_type().to_string();
        errors::wrong_type(format!(
            "{name} lends no memory; accepted: a buffer, a tensor with __dlpack__, or Memory"
        ))
    })
}

/// Dimensions of an array without gaps.
pub(super) fn compact(shape: &[usize], itemsize: usize) -> Vec<Dim> {
    let mut stride = itemsize;
    let mut dims: Vec<Dim> = Vec::with_capacity(shape.len());
    for count in shape.iter().rev() {
        let count = *count;
        dims.push(Dim { count, stride });
        stride = stride.saturating_mul(count);
    }
    dims.reverse();
    dims
}

/// Dimensions with strides in bytes. Errors: `Invalid` for one that runs backwards.
pub(super) fn strided(shape: &[usize], strides: &[isize]) -> PyResult<Vec<Dim>> {
    if shape.len() != strides.len() {
        let (dims, given) = (shape.len(), strides.len());
        return Err(errors::invalid(format!(
            "{given} strides for {dims} dimensions; accepted: one for each"
        )));
    }
    let dim = |(count, stride): (&usize, &isize)| {
        // Where there is one element or none, the stride says nothing.
        let stride = if *count > 1 { *stride } else { 0 };
        let count = *count;
        let stride = usize::try_from(stride).map_err(|_| {
            errors::invalid(format!("a stride of {stride}; accepted: 0 or more bytes"))
        })?;
        Ok(Dim { count, stride })
    };
    shape.iter().zip(strides).map(dim).collect()
}

/// Whole numbers: a sequence, or an array of 32- or 64-bit integers.
/// Errors: `TypeError`, `Invalid` for what is negative or does not fit.
pub(crate) fn numbers<T: TryFrom<i64>>(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<T>> {
    let is_list = object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>();
    let values = match array(object) {
        Ok(array) if !is_list => items(name, &array)?,
        _ => object
            .try_iter()?
            .map(|item| item?.extract())
            .collect::<PyResult<Vec<i64>>>()?,
    };
    let read = |value: i64| {
        T::try_from(value)
            .map_err(|_| errors::invalid(format!("{name} hold {value}; accepted: what fits")))
    };
    values.into_iter().map(read).collect()
}

fn items(name: &str, array: &Array) -> PyResult<Vec<i64>> {
    let ([dim], 4 | 8) = (array.dims.as_slice(), array.itemsize) else {
        let (dims, itemsize) = (array.dims.len(), array.itemsize);
        return Err(errors::invalid(format!(
            "{name} are an array of {dims} dimensions, {itemsize} bytes an item; accepted: one \
             dimension of 32- or 64-bit integers"
        )));
    };
    let item = |index: usize| {
        let mut bytes = [0; 8];
        let (place, _) = bytes.split_at_mut(array.itemsize);
        array.read(index * dim.stride, place);
        match array.itemsize {
            // Signed or not, no number of ours has the upper bit.
            4 => i64::from(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
            _ => i64::from_le_bytes(bytes),
        }
    };
    Ok((0..dim.count).map(item).collect())
}
