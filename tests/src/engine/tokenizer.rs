//! Text to tokens and back, from the vocabulary inside a GGUF file.
//!
//! Upstairs:   the demo and tests.
//! Downstairs: the `tokenizers` crate runs the byte-level BPE.
//!
//! Invariant: decoding what was encoded returns the text, byte for byte.
//!
//! Not here on purpose: chat templates in general; [`Tokenizer::chat`] writes the one of our
//! model. Other pre-tokenisers are refused by name rather than approximated.

use candle_core::quantized::gguf_file::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper};

use super::error::EngineError;
use super::gguf::Metadata;

/// GGUF's mark of a control token, such as the end of a turn.
const TOKEN_TYPE_CONTROL: i64 = 3;

/// A byte-level BPE tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    end_of_turn: Option<u32>,
}

impl Tokenizer {
    pub(super) fn from_metadata(metadata: &Metadata<'_>) -> Result<Self, EngineError> {
        let model = metadata.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let problem = format!("tokenizer model is {model:?}; accepted: gpt2 (byte-level BPE)");
            return Err(metadata.problem(problem));
        }
        let tokens = texts(metadata, "tokenizer.ggml.tokens")?;
        let vocab: Vocab = tokens
            .iter()
            .zip(0..)
            .map(|(t, id)| ((*t).to_owned(), id))
            .collect();
        let mut merges = Vec::new();
        for merge in texts(metadata, "tokenizer.ggml.merges")? {
            let (a, b) = merge
                .split_once(' ')
                .ok_or_else(|| metadata.problem(format!("merge {merge:?} is not a pair")))?;
            merges.push((a.to_owned(), b.to_owned()));
        }
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).build();
        let bpe = bpe.map_err(|error| metadata.problem(format!("vocabulary: {error}")))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(pre_tokenizer(metadata)?));
        inner.with_decoder(Some(ByteLevel::default()));
        inner.add_special_tokens(&control_tokens(metadata, &tokens));
        let end_of_turn = inner.token_to_id("<|im_end|>");
        Ok(Self { inner, end_of_turn })
    }

    /// The tokens of `text`. Control tokens in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        Ok(self
            .inner
            .encode_fast(text, false)
            .map_err(refused)?
            .get_ids()
            .to_vec())
    }

    /// The text of `tokens`, control tokens included.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, EngineError> {
        self.inner.decode(tokens, false).map_err(refused)
    }

    /// The token that ends a turn of conversation, if this vocabulary has one.
    pub const fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }

    /// `user` as the first turn of a conversation, ready for the answer.
    pub fn chat(user: &str) -> String {
        format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
    }
}

fn pre_tokenizer(metadata: &Metadata<'_>) -> Result<PreTokenizerWrapper, EngineError> {
    let bytes = ByteLevel::new(false, true, true);
    match metadata.text("tokenizer.ggml.pre").unwrap_or("gpt-2") {
        "gpt-2" | "default" => Ok(bytes.into()),
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into()),
        other => Err(metadata.problem(format!("pre-tokeniser {other:?}; accepted: smollm, gpt-2"))),
    }
}

fn control_tokens(metadata: &Metadata<'_>, tokens: &[&str]) -> Vec<AddedToken> {
    let types = metadata
        .list("tokenizer.ggml.token_type")
        .unwrap_or_default();
    let is_control = |kind: &Value| match kind {
        Value::I32(kind) => i64::from(*kind) == TOKEN_TYPE_CONTROL,
        Value::U32(kind) => i64::from(*kind) == TOKEN_TYPE_CONTROL,
        _ => false,
    };
    let control = tokens
        .iter()
        .zip(types)
        .filter(|(_, kind)| is_control(kind));
    control
        .map(|(token, _)| AddedToken::from(*token, true))
        .collect()
}

fn texts<'a>(metadata: &Metadata<'a>, key: &str) -> Result<Vec<&'a str>, EngineError> {
    let text = |value: &'a Value| match value {
        Value::String(text) => Ok(text.as_str()),
        _ => Err(metadata.problem(format!("{key} holds something that is not a text"))),
    };
    metadata.list(key)?.iter().map(text).collect()
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "it is the argument of map_err"
)]
fn refused(error: tokenizers::Error) -> EngineError {
    EngineError::Tokenizer(error.to_string())
}
