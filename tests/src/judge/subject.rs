//! What is judged on: a model, and documents as its tokens.
//!
//! Upstairs:   `export`, `fisher`, `quality`.
//! Downstairs: the engine, the sets of texts.
//!
//! Invariants kept here
//!   J1  All documents of a set have the same length, and none is padded: one that is too short
//!       is an error, because its numbers would be others than those of the rest.
//!
//! Not here on purpose: what is done with them.

use std::path::Path;
use std::sync::Arc;

use kvtier_benches::report::Problem;

use crate::engine::{self, Model, Sequence, SequenceOptions, Tokenizer};
use crate::text::Document;
use crate::weights;

/// A document as the model reads it.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Name for people.
    pub name: String,
    /// The tokens.
    pub ids: Vec<u32>,
}

/// The reference model, or the one at `path`.
pub fn load(path: Option<&Path>) -> Result<(Arc<Model>, Tokenizer), Problem> {
    let file = weights::model_file(path)?;
    let (model, tokenizer) = engine::load(&file.path, file.sha256)?;
    Ok((Arc::new(model), tokenizer))
}

/// The first `count` tokens of each document (J1).
pub fn tokens(
    tokenizer: &Tokenizer,
    documents: &[Document],
    count: usize,
) -> Result<Vec<Tokens>, Problem> {
    let one = |document: &Document| {
        let mut ids = tokenizer.encode(&document.text)?;
        if ids.len() < count {
            let (name, got) = (document.name, ids.len());
            return Err(format!("document {name} has {got} tokens; needed: {count}").into());
        }
        ids.truncate(count);
        Ok(Tokens {
            name: document.name.to_owned(),
            ids,
        })
    };
    documents.iter().map(one).collect()
}

/// A sequence that has computed `tokens`, in blocks of the default size, with `room` for more.
pub fn prefilled(model: &Arc<Model>, tokens: &[u32], room: usize) -> Result<Sequence, Problem> {
    let options = SequenceOptions::new(tokens.len() + room);
    let mut sequence = Sequence::new(Arc::clone(model), options)?;
    sequence.prefill(tokens)?;
    Ok(sequence)
}
