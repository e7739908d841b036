//! Seeded random weights for any shape, for tests that need no download.
//!
//! Upstairs:   tests call [`Model::random`].
//! Downstairs: `model` asks for matrices by name.
//!
//! Invariant: the same configuration and seed give the same weights on every machine and in
//! every later version: the generator is ChaCha8 and the mapping to numbers is ours.
//!
//! Not here on purpose: sense. Such a model speaks nonsense, but always the same nonsense.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

use super::config::ModelConfig;
use super::error::EngineError;
use super::model::{Model, Source};

/// Makes attention and logits of a small random model decided rather than flat.
const GAIN: f32 = 1.5;

impl Model {
    /// A model of this shape with weights drawn from `seed`.
    pub fn random(config: ModelConfig, seed: u64) -> Result<Self, EngineError> {
        config.check()?;
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(format!("{config:?}"));
        let fingerprint = hash.finalize().into();
        let mut source = RandomSource {
            rng: ChaCha8Rng::seed_from_u64(seed),
            fingerprint,
        };
        Self::build(config, &mut source)
    }
}

struct RandomSource {
    rng: ChaCha8Rng,
    fingerprint: [u8; 32],
}

impl RandomSource {
    /// Uniform in -1 .. 1, from the upper 24 bits so that every value is exact.
    #[expect(clippy::cast_precision_loss, reason = "24 bits fit f32 exactly")]
    fn next(&mut self) -> f32 {
        (self.rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl Source for RandomSource {
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    fn matrix(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Vec<f32>, EngineError> {
        // A uniform value has variance 1/3; this keeps the size of what passes through.
        let fan_in = if name == "token_embd" { 1 } else { inputs };
        let scale = GAIN * (3.0 / fan_in as f32).sqrt();
        Ok((0..outputs * inputs).map(|_| self.next() * scale).collect())
    }

    fn norm(&mut self, _name: &str, width: usize) -> Result<Vec<f32>, EngineError> {
        Ok((0..width).map(|_| 1.0 + 0.2 * self.next()).collect())
    }

    fn has_own_head(&self) -> bool {
        true
    }

    fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}
