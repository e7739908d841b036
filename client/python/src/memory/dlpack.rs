//! DLPack: arrays of other libraries in, tensors over our bytes out.
//!
//! Upstairs:   `array` reads what callers pass; `view` hands tensors out.
//! Downstairs: the C structures of DLPack 1.0, and of before where there is no version.
//!
//! A capsule that comes in is kept and not consumed: it keeps the memory for as long as it lives,
//! and its own destructor gives it back. A tensor that goes out counts as a use of the bytes until
//! its deleter runs, which may be on any thread.
//!
//! Not here on purpose
//!   No memory of devices: it is refused by name.
//!   No read-only tensor for a consumer that cannot be told that it is read-only.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use kvtier_client::Element;
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use super::{Array, Dim, Keeper, Use};
use crate::errors;

/// Memory of the CPU, and memory of it that a device can reach.
const CPU: i32 = 1;
const HOST: [i32; 3] = [CPU, 3, 11];

/// Where our bytes are.
pub(super) const DEVICE: (i32, i32) = (CPU, 0);

const MAJOR: u32 = 1;
const READ_ONLY: u64 = 1;

#[repr(C)]
#[allow(dead_code, reason = "the other end reads it")]
struct Device {
    kind: i32,
    number: i32,
}

#[repr(C)]
#[allow(dead_code, reason = "the other end reads it")]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
#[allow(dead_code, reason = "the other end reads it")]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
#[allow(dead_code, reason = "the other end reads it")]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: Tensor,
}

#[repr(C)]
#[allow(dead_code, reason = "the other end reads it")]
struct Legacy {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Legacy)>,
}

/// The two forms of a managed tensor.
trait Managed: Sized {
    const NAME: &'static CStr;

    fn made(tensor: Tensor, read_only: bool) -> Self;
    fn tensor(&self) -> &Tensor;
    fn tensor_mut(&mut self) -> &mut Tensor;
    fn is_read_only(&self) -> bool;
}

impl Managed for Versioned {
    const NAME: &'static CStr = c"dltensor_versioned";

    fn made(tensor: Tensor, read_only: bool) -> Self {
        Self {
            major: MAJOR,
            minor: 0,
            context: std::ptr::null_mut(),
            deleter: Some(delete::<Self>),
            flags: if read_only { READ_ONLY } else { 0 },
            tensor,
        }
    }

    fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    fn tensor_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }

    fn is_read_only(&self) -> bool {
        self.flags & READ_ONLY != 0
    }
}

impl Managed for Legacy {
    const NAME: &'static CStr = c"dltensor";

    fn made(tensor: Tensor, _read_only: bool) -> Self {
        Self {
            tensor,
            context: std::ptr::null_mut(),
            deleter: Some(delete::<Self>),
        }
    }

    fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    fn tensor_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }

    fn is_read_only(&self) -> bool {
        false
    }
}

/// A tensor over our bytes, with what it points to.
#[repr(C)]
struct Lent<M> {
    managed: M,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _of: Use,
}

/// Gives a tensor back: the consumer is done with it.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: `managed` is the first field of the box that `lend` leaked.
    //   Live    the consumer calls the deleter once, and nothing before it frees the box.
    //   Stable  a box does not move; `Lent` is `repr(C)`.
    //   Alone   the consumer has given the tensor up.
    //   Drop    here, and it needs no interpreter.
    drop(unsafe { Box::from_raw(managed.cast::<Lent<M>>()) });
}

/// The capsule goes and nobody took the tensor out of it, or it was renamed by who did.
unsafe extern "C" fn unclaimed<M: Managed>(capsule: *mut ffi::PyObject) {
    // SAFETY: asks a capsule for its pointer.
    //   Live    the interpreter destroys it after this returns.
    //   Stable  n/a
    //   Alone   the interpreter is attached here.
    //   Drop    n/a
    let valid = unsafe { ffi::PyCapsule_IsValid(capsule, M::NAME.as_ptr()) };
    if valid == 0 {
        return;
    }
    // SAFETY: as above; it has this name.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, M::NAME.as_ptr()) };
    // SAFETY: `lend` put this pointer there, and no consumer took it: it would have renamed it.
    //   Live    until here.
    //   Stable  as in `delete`.
    //   Alone   the capsule is gone with this call.
    //   Drop    by `delete`.
    unsafe { delete::<M>(managed.cast()) };
}

/// Code and bits of an element as DLPack has them; 8-bit floats are bytes, since its first version
/// has none.
fn data_type(element: Element) -> DataType {
    let (code, bits) = match element {
        Element::Bf16 => (4, 16),
        Element::F16 => (2, 16),
        Element::F32 => (2, 32),
        Element::F8E4m3 | Element::F8E5m2 | Element::U8 => (1, 8),
    };
    DataType {
        code,
        bits,
        lanes: 1,
    }
}

/// A capsule over the bytes from `at`, for a consumer that knows versions or one that does not.
///
/// Errors: `BufferError` where the bytes are read-only and the consumer cannot be told.
pub(super) fn export<'py>(
    py: Python<'py>,
    of: Use,
    at: usize,
    shape: &[usize],
    element: Element,
    versioned: bool,
) -> PyResult<Bound<'py, PyCapsule>> {
    if versioned {
        return lend::<Versioned>(py, of, at, shape, element);
    }
    if !of.is_writable() {
        let text = "a read-only tensor needs a library that speaks DLPack 1.0; copy it instead";
        return Err(errors::buffer(text));
    }
    lend::<Legacy>(py, of, at, shape, element)
}

fn lend<'py, M: Managed>(
    py: Python<'py>,
    of: Use,
    at: usize,
    shape: &[usize],
    element: Element,
) -> PyResult<Bound<'py, PyCapsule>> {
    let shape: Vec<i64> = shape
        .iter()
        .map(|count| i64::try_from(*count).unwrap_or(i64::MAX))
        .collect();
    let mut strides = vec![1; shape.len()];
    let mut step = 1i64;
    for (stride, count) in strides.iter_mut().zip(&shape).rev() {
        *stride = step;
        step = step.saturating_mul(*count);
    }
    let read_only = !of.is_writable();
    let tensor = Tensor {
        data: of.start().as_ptr().cast(),
        device: Device {
            kind: CPU,
            number: 0,
        },
        ndim: i32::try_from(shape.len()).unwrap_or(i32::MAX),
        dtype: data_type(element),
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: u64::try_from(at).unwrap_or(u64::MAX),
    };
    let managed = M::made(tensor, read_only);
    let mut lent = Box::new(Lent {
        managed,
        shape,
        strides,
        _of: of,
    });
    let (shape, strides) = (lent.shape.as_mut_ptr(), lent.strides.as_mut_ptr());
    let tensor = lent.managed.tensor_mut();
    (tensor.shape, tensor.strides) = (shape, strides);
    let pointer = NonNull::from(Box::leak(lent)).cast::<c_void>();
    // SAFETY: the capsule owns the box from here on.
    //   Live    the box is freed by the consumer's call of the deleter, or by `unclaimed`.
    //   Stable  a box does not move.
    //   Alone   nothing here keeps a reference to it.
    //   Drop    `unclaimed` and `delete` may run on any thread.
    unsafe {
        PyCapsule::new_with_pointer_and_destructor(py, pointer, M::NAME, Some(unclaimed::<M>))
    }
}

/// The array behind an object's `__dlpack__`. `None` when it has none.
///
/// Errors: `Invalid` for memory of a device, and for strides that run backwards.
pub(super) fn import(object: &Bound<'_, PyAny>) -> PyResult<Option<Array>> {
    let py = object.py();
    let Some(lend) = object.getattr_opt("__dlpack__")? else {
        return Ok(None);
    };
    let (device, number): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
    if !HOST.contains(&device) {
        return Err(errors::invalid(format!(
            "memory of device {number} of DLPack type {device}; accepted: memory of the CPU"
        )));
    }
    let newest = PyDict::new(py);
    newest.set_item("max_version", (MAJOR, 0))?;
    let capsule = match lend.call((), Some(&newest)) {
        Err(error) if error.is_instance_of::<PyTypeError>(py) => lend.call0()?,
        other => other?,
    };
    let capsule = capsule.cast_into::<PyCapsule>()?;
    if capsule.is_valid_checked(Some(Versioned::NAME)) {
        return borrowed::<Versioned>(capsule).map(Some);
    }
    borrowed::<Legacy>(capsule).map(Some)
}

fn borrowed<M: Managed>(capsule: Bound<'_, PyCapsule>) -> PyResult<Array> {
    let managed = capsule.pointer_checked(Some(M::NAME))?.cast::<M>();
    // SAFETY: a capsule of this name holds a managed tensor of this form.
    //   Live    the capsule is alive in this function, and kept by the array afterwards.
    //   Stable  its owner does not change a tensor that it has lent.
    //   Alone   it is only read here.
    //   Drop    the capsule's own destructor.
    let managed = unsafe { managed.as_ref() };
    let tensor = managed.tensor();
    let itemsize = usize::from(tensor.dtype.bits).div_ceil(8) * usize::from(tensor.dtype.lanes);
    let ndim = usize::try_from(tensor.ndim).unwrap_or_default();
    let (shape, strides) = (list(tensor.shape, ndim), list(tensor.strides, ndim));
    let writable = !managed.is_read_only();
    let offset = usize::try_from(tensor.byte_offset).unwrap_or(usize::MAX);
    let base = tensor.data.cast::<u8>().wrapping_add(offset);
    let dims = dims(&shape, &strides, itemsize)?;
    let keeper = Keeper::Object(capsule.into_any().unbind());
    Array::new(base, dims, itemsize, writable, keeper)
}

/// Numbers of a tensor; empty for none.
fn list(from: *const i64, len: usize) -> Vec<i64> {
    if from.is_null() || len == 0 {
        return Vec::new();
    }
    // SAFETY: a tensor's list has as many numbers as it has dimensions.
    //   Live    as the tensor.
    //   Stable  as the tensor.
    //   Alone   only read.
    //   Drop    n/a: copied out at once.
    unsafe { std::slice::from_raw_parts(from, len) }.to_vec()
}

/// Dimensions of a tensor; no strides are an array without gaps.
fn dims(shape: &[i64], strides: &[i64], itemsize: usize) -> PyResult<Vec<Dim>> {
    let counts: Vec<usize> = shape
        .iter()
        .map(|count| usize::try_from(*count).unwrap_or_default())
        .collect();
    if strides.is_empty() {
        return Ok(super::array::compact(&counts, itemsize));
    }
    let bytes = |stride: &i64| {
        let bytes = isize::try_from(*stride).ok();
        bytes.and_then(|stride| stride.checked_mul(isize::try_from(itemsize).ok()?))
    };
    let strides: Option<Vec<isize>> = strides.iter().map(bytes).collect();
    let strides = strides.ok_or_else(|| errors::invalid("the array is larger than memory"))?;
    super::array::strided(&counts, &strides)
}
