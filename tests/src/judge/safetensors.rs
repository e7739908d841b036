//! Writing safetensors files: a length, a JSON header, the tensors' bytes.
//!
//! Upstairs:   `export`.
//! Downstairs: a file.
//!
//! Not here on purpose: reading; calibration does that, with a reader of its own.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use kvtier_benches::report::Problem;
use serde_json::{Map, json};

/// One tensor of a file.
pub(super) struct Tensor<'a> {
    /// Its name.
    pub(super) name: &'static str,
    /// Its element type, as the format calls it.
    pub(super) dtype: &'static str,
    /// Its shape; nothing for a scalar.
    pub(super) shape: Vec<usize>,
    /// Its bytes, little endian, in pieces that follow each other.
    pub(super) data: Vec<&'a [u8]>,
}

/// Alignment of the data. Unit: bytes.
const ALIGNMENT: usize = 8;

/// Writes `tensors` to the file `path`.
pub(super) fn write(path: &Path, tensors: &[Tensor<'_>]) -> Result<(), Problem> {
    let mut header = Map::new();
    let mut at = 0;
    for tensor in tensors {
        let from = at;
        at += tensor.data.iter().map(|piece| piece.len()).sum::<usize>();
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [from, at],
        });
        header.insert(tensor.name.to_owned(), entry);
    }
    let mut header = serde_json::to_string(&header)?;
    let padding = header.len().next_multiple_of(ALIGNMENT) - header.len();
    header.extend(std::iter::repeat_n(' ', padding));
    let cannot = |error| format!("cannot write {}: {error}", path.display());
    let mut file = BufWriter::new(File::create(path).map_err(cannot)?);
    file.write_all(&u64::try_from(header.len())?.to_le_bytes())
        .map_err(cannot)?;
    file.write_all(header.as_bytes()).map_err(cannot)?;
    for piece in tensors.iter().flat_map(|tensor| &tensor.data) {
        file.write_all(piece).map_err(cannot)?;
    }
    file.flush().map_err(cannot)?;
    Ok(())
}
