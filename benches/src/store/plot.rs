//! The picture of the suite: throughput over the size of a block, ours beside fio's.
//!
//! Upstairs:   `store`.
//! Downstairs: `plotters`, into SVG.

use std::path::Path;

use kvtier_proto::units::{KIB, MIB};
use plotters::prelude::*;

use super::{SIZES, size_label};
use kvtier_benches::report::{Problem, Report};

/// Size of the picture. Unit: pixels.
const PICTURE: (u32, u32) = (1040, 420);

/// Draws random reads and durable writes beside each other.
pub(super) fn draw(path: &Path, report: &Report) -> Result<(), Problem> {
    let area = SVGBackend::new(path, PICTURE).into_drawing_area();
    area.fill(&WHITE)?;
    let halves = area.split_evenly((1, 2));
    for (half, what) in halves.iter().zip(["read.random", "write.durable"]) {
        panel(half, what, report)?;
    }
    area.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    what: &str,
    report: &Report,
) -> Result<(), Problem> {
    let sides = [
        ("limit", "fio, io_uring", BLACK),
        ("store", "the store", RED),
        ("lane", "our io_uring lane alone", BLUE),
        ("lane_pread", "our pread lane alone", GREEN),
        ("lane_checked", "the lane, cold memory, checksums", MAGENTA),
    ];
    let lines: Vec<_> = (sides.iter())
        .map(|(side, label, colour)| {
            let points = SIZES.iter().filter_map(|size| {
                let name = format!("{side}.{what}.{}.gib_s", size_label(*size));
                Some((*size as f64 / KIB as f64, report.median(&name)?))
            });
            (*label, *colour, points.collect::<Vec<_>>())
        })
        .filter(|(_, _, points)| !points.is_empty())
        .collect();
    let top = lines
        .iter()
        .flat_map(|(_, _, points)| points.iter().map(|point| point.1));
    let top = top.fold(0.1, f64::max) * 1.15;
    let from_to = (48.0..2.6 * MIB as f64 / KIB as f64).log_scale();
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("{what}, GiB/s over the size of a block"),
            ("sans-serif", 16),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(from_to, 0.0..top)?;
    let ticks = |kib: &f64| format!("{kib:.0} KiB");
    chart.configure_mesh().x_label_formatter(&ticks).draw()?;
    for (label, colour, points) in lines {
        let drawn = chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
        drawn
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        let dot = |point| Circle::new(point, 3, colour.filled());
        chart.draw_series(points.into_iter().map(dot))?;
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .position(SeriesLabelPosition::LowerRight)
        .draw()?;
    Ok(())
}
