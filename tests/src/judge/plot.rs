//! The picture: divergence over rate, a dot a level.
//!
//! Upstairs:   `kvtier-judge quality --plot`.
//! Downstairs: `plotters`, into SVG.
//!
//! Not here on purpose: exact levels. They have no divergence, and the axis is logarithmic.

use std::path::Path;

use kvtier_benches::report::Problem;
use plotters::prelude::*;

use super::verdict::SetFigures;

/// Size of the picture. Unit: pixels.
const PICTURE: (u32, u32) = (1040, 520);

/// Draws every lossy level of both sets beside each other.
pub(super) fn draw(path: &Path, all: &[SetFigures]) -> Result<(), Problem> {
    let area = SVGBackend::new(path, PICTURE).into_drawing_area();
    area.fill(&WHITE)?;
    let halves = area.split_evenly((1, 2));
    let sets = [
        ("heldout", "held-out text"),
        ("foreign", "text unlike any of calibration"),
    ];
    for (half, (set, title)) in halves.iter().zip(sets) {
        let of_set: Vec<_> = all.iter().filter(|one| one.set == set).collect();
        panel(half, title, &of_set)?;
    }
    area.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    levels: &[&SetFigures],
) -> Result<(), Problem> {
    let dots: Vec<(f64, f64, &str)> = levels
        .iter()
        .map(|one| (one.bits(), one.change().kl(), one.name))
        .filter(|(_, kl, _)| *kl > 0.0)
        .collect();
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("KL a token over bits a number, {title}"),
            ("sans-serif", 15),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d((0.7..12.0).log_scale(), (1e-5..2.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bits")
        .x_label_formatter(&|bits: &f64| format!("{bits}"))
        .y_label_formatter(&|kl: &f64| format!("{kl:.0e}"))
        .draw()?;
    let colour = |name: &str| {
        let ours = ["transparent", "balanced", "small"];
        match ours.iter().any(|start| name.starts_with(start)) {
            true => RED,
            false => BLUE,
        }
    };
    chart.draw_series(
        dots.iter()
            .map(|(bits, kl, name)| Circle::new((*bits, *kl), 4, colour(name).filled())),
    )?;
    chart.draw_series(dots.iter().map(|(bits, kl, name)| {
        let style = ("sans-serif", 12).into_font().color(&BLACK);
        Text::new((*name).to_owned(), (*bits * 1.04, *kl * 1.15), style)
    }))?;
    Ok(())
}
