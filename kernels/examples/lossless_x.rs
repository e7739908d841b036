//! Adds lossless_x to a profile from samples and measures it: scratch.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]
use kvtier_kernels::calibrate::{exact, measure::measure, samples::Document};
use kvtier_kernels::profile::Profile;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let back: u32 = args[2].parse().unwrap();
    let mut profile = Profile::from_bytes(&std::fs::read(&args[1]).unwrap()).unwrap();
    let read = |prefix: &str| -> Vec<Vec<u8>> {
        let mut names: Vec<_> = std::fs::read_dir(&args[3]).unwrap().map(|e| e.unwrap().path())
            .filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(prefix)).collect();
        names.sort();
        names.iter().map(|p| std::fs::read(p).unwrap()).collect()
    };
    let (cal, held) = (read("cal"), read("heldout"));
    let docs: Vec<_> = cal.iter().map(|b| Document::parse(b).unwrap()).collect();
    let held: Vec<_> = held.iter().map(|b| Document::parse(b).unwrap()).collect();
    let t = std::time::Instant::now();
    let bits = exact::add(&docs, &mut profile, (back, 2), &|_| {}).unwrap();
    println!("learnt {bits:?} in {:?}", t.elapsed());
    for part in &mut profile.parts {
        part.plain.levels = [None, None, None];
        for cross in &mut part.crosses { cross.levels = [None, None, None]; }
    }
    std::fs::write(&args[4], profile.to_bytes().unwrap()).unwrap();
    let t = std::time::Instant::now();
    for s in measure(profile, &held, 2).unwrap() {
        println!("{:?} bits {:.4} ratio {:.4} k {:.4} of all in {:?}", s.level, 16.0 * s.stored_bytes as f64 / s.raw_bytes as f64,
            s.raw_bytes as f64 / s.stored_bytes as f64, s.k_bytes as f64 / s.stored_bytes as f64, t.elapsed());
    }
}
