//! Byte planes: the scalar reference of splitting floats by the weight of their bytes.
//!
//! Upstairs:   [`crate::codec::byte_planes`]; later coders of exponents.
//! Downstairs: nothing.
//!
//! The exponents of attention KV fill a few values, its mantissas look like noise. Interleaved,
//! the noise hides the exponents from a byte coder; apart, they code well. So an element is
//! rotated left by one bit, which puts the sign below the mantissa and the whole exponent on
//! top, and then cut into bytes: plane 0 takes the most significant byte of every element, the
//! last plane the least significant one with the sign in bit 0.
//!
//! ```text
//! bf16   s eeeeeeee mmmmmmm      ->  plane 0: eeeeeeee   plane 1: mmmmmmm s
//! f16    s eeeee mmmmmmmmmm      ->  plane 0: eeeee mmm  plane 1: mmmmmmm s
//! f32    s eeeeeeee mmm...       ->  plane 0: eeeeeeee   planes 1 to 3: mantissa, sign last
//! ```
//!
//! Splitting by weight before an entropy coder is the byte shuffle of Blosc; keeping the sign out
//! of the exponent plane is as in ZipNN (Hershcovitch et al. 2024). The loops carry nothing from
//! one element to the next, so that the compiler vectorises them.
//!
//! Not here on purpose: no SIMD intrinsics and no unsafe code; no difference between tokens, as
//! that gains nothing on real KV.

/// Splits 2-byte elements into their exponent plane and their mantissa-and-sign plane.
///
/// ```
/// use kvtier_kernels::planes;
///
/// let raw = [0x80, 0x3f, 0x80, 0xbf]; // 1.0 and -1.0 as bf16
/// let (mut high, mut low) = ([0; 2], [0; 2]);
/// planes::split2(&raw, [&mut high, &mut low]);
/// assert_eq!((high, low), ([0x7f, 0x7f], [0x00, 0x01]));
/// ```
///
/// # Panics
/// When a plane is not as long as there are elements.
pub fn split2(raw: &[u8], planes: [&mut [u8]; 2]) {
    let [high, low] = planes;
    let elements = elements_of::<2>(raw, [high.len(), low.len()]);
    for ((element, high), low) in elements.iter().zip(high).zip(low) {
        let [mantissa, exponent] = u16::from_le_bytes(*element).rotate_left(1).to_le_bytes();
        *high = exponent;
        *low = mantissa;
    }
}

/// Joins what [`split2`] split.
///
/// # Panics
/// When a plane is not as long as there are elements.
pub fn merge2(planes: [&[u8]; 2], raw: &mut [u8]) {
    let [high, low] = planes;
    let elements = elements_of_mut::<2>(raw, [high.len(), low.len()]);
    for ((element, high), low) in elements.iter_mut().zip(high).zip(low) {
        *element = u16::from_le_bytes([*low, *high])
            .rotate_right(1)
            .to_le_bytes();
    }
}

/// Splits 4-byte elements into four planes, most significant byte first.
///
/// # Panics
/// When a plane is not as long as there are elements.
pub fn split4(raw: &[u8], planes: [&mut [u8]; 4]) {
    let [a, b, c, d] = planes;
    let elements = elements_of::<4>(raw, [a.len(), b.len(), c.len(), d.len()]);
    for ((((element, a), b), c), d) in elements.iter().zip(a).zip(b).zip(c).zip(d) {
        let [b0, b1, b2, b3] = u32::from_le_bytes(*element).rotate_left(1).to_le_bytes();
        *a = b3;
        *b = b2;
        *c = b1;
        *d = b0;
    }
}

/// Joins what [`split4`] split.
///
/// # Panics
/// When a plane is not as long as there are elements.
pub fn merge4(planes: [&[u8]; 4], raw: &mut [u8]) {
    let [a, b, c, d] = planes;
    let elements = elements_of_mut::<4>(raw, [a.len(), b.len(), c.len(), d.len()]);
    for ((((element, a), b), c), d) in elements.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *element = u32::from_le_bytes([*d, *c, *b, *a])
            .rotate_right(1)
            .to_le_bytes();
    }
}

/// One plane: elements of a byte have nothing to split.
///
/// # Panics
/// When the plane is not as long as there are elements.
pub fn split1(raw: &[u8], planes: [&mut [u8]; 1]) {
    let [plane] = planes;
    plane.copy_from_slice(raw);
}

/// Joins what [`split1`] split.
///
/// # Panics
/// When the plane is not as long as there are elements.
pub fn merge1(planes: [&[u8]; 1], raw: &mut [u8]) {
    let [plane] = planes;
    raw.copy_from_slice(plane);
}

fn elements_of<const P: usize>(raw: &[u8], planes: [usize; P]) -> &[[u8; P]] {
    let (elements, rest) = raw.as_chunks::<P>();
    assert_lengths(elements.len(), rest.len(), planes);
    elements
}

fn elements_of_mut<const P: usize>(raw: &mut [u8], planes: [usize; P]) -> &mut [[u8; P]] {
    let (elements, rest) = raw.as_chunks_mut::<P>();
    assert_lengths(elements.len(), rest.len(), planes);
    elements
}

/// A plane of another length would leave elements unwritten: wrong bytes without an error.
fn assert_lengths<const P: usize>(elements: usize, rest: usize, planes: [usize; P]) {
    assert!(
        rest == 0 && planes.iter().all(|len| *len == elements),
        "planes of {planes:?} bytes do not fit {elements} elements of {P} bytes and {rest} more"
    );
}

#[cfg(test)]
mod tests;
