//! Layouts of the session's blocks, computed once a size.
//!
//! Upstairs:   slots are filled and leases are read by these.
//! Downstairs: `kvtier_proto::layout`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvtier_proto::{BlockLayout, ModelDescriptor, PayloadKind};

use crate::error::Error;

pub(crate) struct Layouts {
    model: ModelDescriptor,
    /// At most one entry a kind and number of tokens: 5 times 2048.
    known: Mutex<HashMap<(PayloadKind, u32), Arc<BlockLayout>>>,
}

impl Layouts {
    pub(crate) fn new(model: ModelDescriptor) -> Self {
        let known = Mutex::default();
        Self { model, known }
    }

    pub(crate) fn model(&self) -> &ModelDescriptor {
        &self.model
    }

    pub(crate) fn get(&self, kind: PayloadKind, tokens: u32) -> Result<Arc<BlockLayout>, Error> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layout) = known.get(&(kind, tokens)) {
            return Ok(Arc::clone(layout));
        }
        let layout = BlockLayout::new(&self.model, kind, tokens);
        let layout = Arc::new(layout.map_err(|error| Error::invalid(error.to_string()))?);
        known.insert((kind, tokens), Arc::clone(&layout));
        Ok(layout)
    }

    /// Layout of a block whose message gives its size; 0 where the descriptor does.
    pub(crate) fn sized(
        &self,
        kind: PayloadKind,
        tokens: u32,
        opaque_bytes: u64,
    ) -> Result<Arc<BlockLayout>, Error> {
        if opaque_bytes == 0 {
            return self.get(kind, tokens);
        }
        if kind != PayloadKind::Opaque {
            let kind = kind.as_str();
            return Err(Error::invalid(format!(
                "opaque_bytes is {opaque_bytes} for a block of kind {kind}; accepted: 0"
            )));
        }
        let max = self.model.block_tokens;
        if tokens == 0 || tokens > max {
            return Err(Error::invalid(format!(
                "{tokens} tokens; accepted: 1 to {max}"
            )));
        }
        let layout = BlockLayout::opaque(tokens, opaque_bytes);
        layout
            .map(Arc::new)
            .map_err(|error| Error::invalid(error.to_string()))
    }

    /// Layout of a block that the daemon says has `length` bytes. Only opaque blocks may have
    /// another length than the descriptor gives; the caller compares for all others.
    pub(crate) fn of_length(
        &self,
        kind: PayloadKind,
        tokens: u32,
        length: u64,
    ) -> Result<Arc<BlockLayout>, Error> {
        if kind == PayloadKind::Opaque {
            let own = self.get(kind, tokens).ok();
            let own = own.filter(|own| u64::try_from(own.payload_len()) == Ok(length));
            return own.map_or_else(|| self.sized(kind, tokens, length.max(1)), Ok);
        }
        self.get(kind, tokens)
    }
}
