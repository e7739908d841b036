//! Bytes of a slot or a lease as a buffer and as a tensor.
//!
//! Upstairs:   `slot` and `block` hand these out.
//! Downstairs: Python's buffer protocol, `dlpack`.

use std::ffi::c_int;
use std::sync::Arc;

use kvtier_client::Element;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyTuple};

use super::{Exposed, Use, dlpack};
use crate::errors;
use crate::words;

/// Bytes of a slot or a block, in place.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct View {
    of: Arc<Exposed>,
    at: usize,
    len: usize,
    shape: Vec<usize>,
    element: Element,
}

impl View {
    /// A view of some bytes as a tensor. `shape` times the element's size is `len`.
    pub(crate) fn new(
        of: &Arc<Exposed>,
        at: usize,
        len: usize,
        shape: Vec<usize>,
        element: Element,
    ) -> Self {
        Self {
            of: Arc::clone(of),
            at,
            len,
            shape,
            element,
        }
    }

    /// A view of bytes as bytes.
    pub(crate) fn bytes(of: &Arc<Exposed>, at: usize, len: usize) -> Self {
        Self::new(of, at, len, vec![len], Element::U8)
    }
}

#[pymethods]
impl View {
    #[getter]
    fn nbytes(&self) -> usize {
        self.len
    }

    #[getter]
    fn readonly(&self) -> bool {
        !self.of.is_writable()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    #[getter]
    fn element(&self) -> &'static str {
        words::element(self.element)
    }

    fn __len__(&self) -> usize {
        self.len
    }

    fn __repr__(&self) -> String {
        let element = words::element(self.element);
        format!("View({:?}, {element:?}, nbytes={})", self.shape, self.len)
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let (of, at, len) = {
            let this = slf.get();
            (this.of.begin()?, this.at, this.len)
        };
        // SAFETY: `view` is the one that the interpreter asks to be filled.
        unsafe { fill(view, flags, slf.into_any(), of, at, len) }
    }

    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `view` was filled by `__getbuffer__`.
        unsafe { release(view) };
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let here = dl_device.is_none_or(|device| device == self.__dlpack_device__());
        if stream.is_some() || !here || copy == Some(true) {
            let text = "accepted: no stream, the CPU, and no copy";
            return Err(errors::buffer(text));
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let of = self.of.begin()?;
        dlpack::export(py, of, self.at, &self.shape, self.element, versioned)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        dlpack::DEVICE
    }
}

/// Answers a request for a buffer over `len` bytes from `at`.
///
/// # Safety
/// `view` is a place for a `Py_buffer`, as the interpreter passes it to `__getbuffer__`.
pub(crate) unsafe fn fill(
    view: *mut ffi::Py_buffer,
    flags: c_int,
    owner: Bound<'_, PyAny>,
    of: Use,
    at: usize,
    len: usize,
) -> PyResult<()> {
    let buf = of.start().as_ptr().wrapping_add(at).cast();
    let read_only = c_int::from(!of.is_writable());
    let size = isize::try_from(len).unwrap_or(isize::MAX);
    // SAFETY: fills the place that the interpreter gave, and holds a reference to `owner` in it.
    //   Live    `of` goes into the view below, and `owner` keeps the rest.
    //   Stable  the bytes do not move while they are in use.
    //   Alone   several views of one place are the nature of buffers.
    //   Drop    `release`.
    let filled =
        unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), buf, size, read_only, flags) };
    if filled != 0 {
        return Err(PyErr::fetch(owner.py()));
    }
    // SAFETY: `view` was just filled; the use travels in the field that is the exporter's.
    unsafe { (*view).internal = Box::into_raw(Box::new(of)).cast() };
    Ok(())
}

/// Ends what [`fill`] began.
///
/// # Safety
/// `view` was filled by [`fill`] and is released once.
pub(crate) unsafe fn release(view: *mut ffi::Py_buffer) {
    // SAFETY: reads the exporter's own field.
    let of = unsafe { (*view).internal }.cast::<Use>();
    // SAFETY: `fill` put the box there.
    //   Live    the interpreter releases a view once.
    //   Stable  a box does not move.
    //   Alone   only the exporter touches the field.
    //   Drop    here.
    drop(unsafe { Box::from_raw(of) });
}
