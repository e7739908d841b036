//! Any profile that passes its check, any shape, any bytes: whatever calibration or somebody
//! hostile made of the tables, a level keeps its promises.

use super::*;
use crate::profile::{
    Cross, Input, LevelTables, Matrix16, PartTables, Plain, Rope, TokenPredictor, Transform, scales,
};

/// Number whose magnitude is any power of two within `powers`, of either sign.
fn spread(random: &mut ChaCha8Rng, powers: std::ops::Range<f32>) -> f32 {
    let size = random.random_range(powers).exp2();
    if random.random() { size } else { -size }
}

/// What makes tables. Of a part of all numbers, anything that is accepted is taken; the others
/// suit values about 1.
struct Maker {
    random: ChaCha8Rng,
    wild: f64,
}

impl Maker {
    fn is_wild(&mut self) -> bool {
        self.random.random_bool(self.wild)
    }

    /// A step or scale.
    fn step(&mut self) -> f32 {
        let powers = if self.is_wild() {
            -99.0..99.0
        } else {
            -6.0..0.0
        };
        spread(&mut self.random, powers).abs()
    }

    /// Near one that changes nothing; or integers up to the largest sums, with any scales.
    fn matrix(&mut self, rows: usize, columns: usize) -> Matrix16 {
        if !self.is_wild() {
            let noise = f64::from(spread(&mut self.random, -16.0..-6.0));
            let value = |at: usize| {
                let own = if at / columns == at % columns {
                    1.0
                } else {
                    0.0
                };
                own + noise * self.random.random_range(-1.0..1.0)
            };
            let values: Vec<f64> = (0..rows * columns).map(value).collect();
            return Matrix16::quantise(&values, rows, columns).unwrap();
        }
        // 2^24 is 512 of the largest numbers; no row here is longer.
        let random = &mut self.random;
        let number = |at: usize| match random.random_range(0..3) {
            0 if at % columns < 500 => i16::MIN,
            1 if at % columns < 500 => i16::MAX,
            _ => random.random_range(-2..3),
        };
        let data = (0..rows * columns).map(number).collect();
        let scale = |_| match self.random.random_range(0..6) {
            0 => 0.0,
            1 => spread(&mut self.random, -149.0..127.9).abs(),
            _ => spread(&mut self.random, -16.0..-10.0).abs(),
        };
        Matrix16::new(rows, columns, data, (0..rows).map(scale).collect()).unwrap()
    }

    fn transform(&mut self, channels: usize) -> Transform {
        Transform {
            forward: self.matrix(channels, channels),
            inverse: self.matrix(channels, channels),
        }
    }

    fn floats(&mut self, channels: usize) -> Vec<f32> {
        let value = |_| match self.is_wild() {
            true => spread(&mut self.random, -149.0..127.9),
            false => self.random.random_range(-1.0..1.0),
        };
        (0..channels).map(value).collect()
    }

    fn level(&mut self, channels: usize) -> LevelTables {
        let step = self.step();
        let near = scales::nearest((1.0 / step).into());
        let index = |_| match (self.is_wild(), self.random.random_range(0..9)) {
            (true, _) => self.random.random_range(0..=scales::SCALE_MAX),
            (false, 0) => scales::DEAD,
            (false, _) => near,
        };
        let scales = (0..channels).map(index).collect();
        let predictor = match self.random.random_range(0..3) {
            0 => TokenPredictor::Mean,
            1 => TokenPredictor::Anchor {
                group: self.random.random_range(2..70),
            },
            _ => TokenPredictor::First {
                rho: (0..channels).map(|_| self.random.random()).collect(),
            },
        };
        LevelTables {
            step,
            scales,
            predictor,
        }
    }

    fn levels(&mut self, channels: usize) -> [Option<LevelTables>; 3] {
        std::array::from_fn(|_| {
            let some = self.random.random_range(0..5) > 0;
            some.then(|| self.level(channels))
        })
    }

    fn cross(&mut self, channels: usize, before: &[PartTables]) -> Option<Cross> {
        let chosen = before.iter().filter(|_| self.random.random());
        let mut needs: Vec<_> = chosen.collect();
        needs.truncate(crate::profile::NEEDS_MAX);
        if self.random.random() {
            needs.reverse();
        }
        let columns = needs.iter().map(|part| part.channels()).sum();
        (!needs.is_empty()).then(|| Cross {
            needs: needs.iter().map(|part| (part.layer, part.code)).collect(),
            weights: self.matrix(channels, columns),
            bias: self.floats(channels),
            transform: self.transform(channels),
            levels: self.levels(channels),
        })
    }

    fn part(
        &mut self,
        (layer, code): (u32, PartCode),
        (heads, dim): (u32, u32),
        before: &[PartTables],
    ) -> PartTables {
        let channels = (heads * dim) as usize;
        let crosses = self.random.random_range(0..3);
        PartTables {
            layer,
            code,
            heads,
            dim,
            input: Some(Input {
                centre: self.floats(channels),
                scale: (0..channels).map(|_| self.step()).collect(),
            }),
            plain: Plain {
                mean: self.floats(channels),
                transform: self.transform(channels),
                levels: self.levels(channels),
            },
            crosses: (0..crosses)
                .filter_map(|_| self.cross(channels, before))
                .collect(),
        }
    }
}

/// Any profile of parts of these heads and sizes of a head, K and V.
fn any_profile(seed: u64, layers: u32, sizes: [(u32, u32); 2]) -> Profile {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let wild = [0.0, 0.001, 0.01, 0.2][random.random_range(0..4)];
    let pairs = random.random_range(0..=sizes[0].1 / 2);
    let rope = Rope {
        frequencies: (0..pairs).map(|_| random.random_range(0.0..4.0)).collect(),
        rotate_half: random.random(),
    };
    let mut maker = Maker { random, wild };
    let mut parts: Vec<PartTables> = Vec::new();
    for layer in 0..layers {
        for (code, size) in [PartCode::K, PartCode::V].into_iter().zip(sizes) {
            parts.push(maker.part((layer, code), size, &parts));
        }
    }
    let mut random = maker.random;
    Profile {
        model: "any".to_owned(),
        revision: String::new(),
        weights_fingerprint: vec![],
        element: Element::Bf16,
        rope: (random.random_range(0..4) > 0).then_some(rope),
        k_after_rope: random.random_range(0..4) > 0,
        sinks: random.random_range(0..9),
        parts,
        measured: vec![],
        exact: Vec::new(),
    }
}

/// A block's parts, of which only some may be looked at.
struct Only<'a>(&'a Block, Vec<(u32, PartCode)>);

impl Restored for Only<'_> {
    fn part(&self, layer: u32, code: PartCode) -> Option<&[u8]> {
        let may = self.1.contains(&(layer, code));
        may.then(|| self.0.part(layer, code)).flatten()
    }
}

/// Codes a part and checks all that is promised of it; returns what is stored and restored.
fn check_part(
    codec: &dyn Codec,
    (shape, raw, sinks): (&PartShape, &[u8], u32),
    before: &Block,
) -> Result<(Vec<u8>, Vec<u8>), TestCaseError> {
    let name = codec.name();
    let before = Only(before, codec.needs(shape));
    let mut stored = vec![0x55; codec.stored_bytes_max(shape)];
    let mut here = vec![0x55; raw.len()];
    let pair = (&mut stored[..], &mut here[..]);
    let len = codec.encode_restoring(shape, raw, &before, pair).unwrap();
    stored.truncate(len);
    let mut back = vec![0xaa; raw.len()];
    codec
        .decode_after(shape, &stored, &before, &mut back)
        .unwrap();
    prop_assert!(here == back, "{name}: encoding restores other bytes");
    let bound = codec.error_in(shape, &stored).unwrap();
    prop_assert!(bound.is_finite() && bound >= 0.0, "{name}: {bound}");
    let (element, size) = (shape.element(), shape.element().bytes());
    let rows = Rows::of(shape);
    for token in 0..shape.tokens() {
        let row = |bytes: &[u8]| rows.row(bytes, token as usize).flatten().copied().collect();
        let (given, got): (Vec<u8>, Vec<u8>) = (row(raw), row(&back));
        let values = floats::read(element, &given);
        let others = floats::read(element, &got);
        let finite = values.iter().all(|value| value.is_finite());
        let sink = shape.position().saturating_add(token) < sinks;
        if sink || !finite {
            prop_assert!(given == got, "{name}: token {token} is not exact");
        }
        for (at, (value, other)) in values.iter().zip(others).enumerate() {
            let same = given[at * size..][..size] == got[at * size..][..size];
            let error = (f64::from(*value) - f64::from(other)).abs();
            let allowed = f64::from(bound) * 1.0001 + f64::from(rounding(element, other));
            prop_assert!(
                same || error <= allowed,
                "{name}: {value} became {other}, beyond {bound}"
            );
        }
    }
    eprintln!(
        "STAT {} {} {}",
        stored[1],
        usize::from(raw != back),
        raw.len() * 100 / stored.len()
    );
    Ok((stored, back))
}

fn any_raw(shape: &PartShape, data: Data, random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut raw = raw_of(shape, data, random);
    if matches!(data, Data::Adversarial) {
        // Whole rows of the largest, the least, and none.
        let rows = Rows::of(shape);
        for _ in 0..random.random_range(0..3) {
            let token = random.random_range(0..shape.tokens()) as usize;
            let most = elements::most(shape.element());
            let value = [most, -most, 0.0, f32::from_bits(1)][random.random_range(0..4)];
            rows.write(&mut raw, token, &vec![value; shape.width() as usize]);
        }
    }
    raw
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    // T1, T3, K4, P1: of every profile that passes the check, on every path.
    #[test]
    fn levels_keep_their_promises_with_any_tables(
        seed in any::<u64>(),
        layers in 1_u32..4,
        sizes in [(1_u32..4, 1_u32..23), (1_u32..4, 1_u32..23)],
        element in prop::sample::select(&FLOATS[..]),
        order in prop::sample::select(&ORDERS[..]),
        position in prop::sample::select(vec![0_u32, 3, 256, 1 << 24, (1 << 24) + 1, u32::MAX - 7]),
        tokens in 1_u32..70,
        data in any_data(),
    ) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let profile = any_profile(seed, layers, sizes);
        let file = profile.to_bytes().unwrap();
        let profile = Profile::from_bytes(&file).unwrap();
        let (sinks, identity) = (profile.sinks, profile.identity());
        let codes = [PartCode::K, PartCode::V];
        let of = |layer| codes.into_iter().zip(sizes).map(move |one| (layer, one));
        let all = (0..layers).flat_map(of);
        let parts: Vec<_> = all.map(|(layer, (code, (heads, dim)))| {
            let shape = PartShape::new(element, tokens, heads * dim).unwrap();
            let shape = shape.of_layer(layer, code).at_position(position);
            let shape = shape.with_heads(heads, order).unwrap();
            let raw = any_raw(&shape, data, &mut random);
            (shape, raw)
        }).collect();
        for codec in Ladder::all(Arc::new(profile)).unwrap() {
            prop_assert_eq!(codec.tables(), identity);
            let mut first = None;
            for path in crate::simd::Path::available() {
                let coded = path.at_most(|| {
                    let (mut block, mut all) = (Block::default(), Vec::new());
                    for (shape, raw) in &parts {
                        let (stored, back) = match codec.applies(shape) {
                            true => check_part(&*codec, (shape, raw, sinks), &block)?,
                            // It is stored at another level, an exact one here.
                            false => (vec![], raw.clone()),
                        };
                        block.0.insert((shape.layer(), shape.code() as u8), back.clone());
                        all.push((stored, back));
                    }
                    Ok::<_, TestCaseError>(all)
                })?;
                let name = codec.name();
                let same = first.get_or_insert_with(|| coded.clone()) == &coded;
                prop_assert!(same, "{name} makes other bits with {path:?}");
            }
        }
    }
}

// T3. An error of infinity would allow anything.
#[test]
fn declared_error_is_finite_with_the_largest_tables() {
    let mut profile = fixture(1, 2, 8).unwrap();
    let part = &mut profile.parts[0];
    let inverse = Matrix16::new(16, 16, vec![30_000; 256], vec![1e8; 16]).unwrap();
    part.plain.transform.inverse = inverse;
    part.plain.levels[1].as_mut().unwrap().step = 1e30;
    let codec = &Ladder::all(Arc::new(profile)).unwrap()[1];
    let shape = shapes((1, 2, 8), (Element::Bf16, ORDERS[0]), (9, 64))[0];
    let raw = raw_of(&shape, Data::Normal, &mut ChaCha8Rng::seed_from_u64(3));
    let stored = encoded(&**codec, &shape, &raw, &Block::default());
    assert!(stored.len() < raw.len());
    assert!(codec.error_in(&shape, &stored).unwrap().is_finite());
}
