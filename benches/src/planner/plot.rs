//! The pictures of the suite.
//!
//! Upstairs:   the suite.
//! Downstairs: `plotters`, into SVG.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::wins::{Map, Point, Way};
use super::{CLAIRVOYANT_BAR, Seen};
use kvtier_benches::report::Problem;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Colours of lines, in turn.
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(255, 127, 14),
    RGBColor(148, 103, 189),
    RGBColor(90, 90, 90),
];

/// Which part of all restores is within how much of the clairvoyant, for each kind.
pub(super) fn spread(path: &Path, all: &[(&'static str, Seen)]) -> Result<(), Problem> {
    let area = SVGBackend::new(path, (1040, 380)).into_drawing_area();
    area.fill(&WHITE)?;
    let halves = area.split_evenly((1, 2));
    let (weathers, others) = all.split_at(all.len().min(COLOURS.len()));
    let titles = ["one device, six weathers", "other scenes, drawn rates"];
    for ((half, title), kinds) in halves.iter().zip(titles).zip([weathers, others]) {
        spread_panel(half, title, kinds)?;
    }
    area.present()?;
    Ok(())
}

fn spread_panel(
    area: &Area<'_>,
    title: &str,
    kinds: &[(&'static str, Seen)],
) -> Result<(), Problem> {
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!("Part of restores within this of the clairvoyant: {title}"),
            ("sans-serif", 13),
        )
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(40)
        .build_cartesian_2d(1.0..1.12, 0.0..1.0)?;
    chart.configure_mesh().light_line_style(WHITE).draw()?;
    let bar = [(CLAIRVOYANT_BAR, 0.0), (CLAIRVOYANT_BAR, 0.95), (1.0, 0.95)];
    chart.draw_series(LineSeries::new(bar, BLACK.mix(0.4)))?;
    for ((name, seen), colour) in kinds.iter().zip(COLOURS) {
        let mut sorted = seen.clairvoyant.clone();
        sorted.sort_by(f64::total_cmp);
        // A point for every fiftieth restore draws the same line.
        let points = (0..=50).map(|step| {
            let part = f64::from(step) / 50.0;
            (super::quantile(&sorted, part).min(1.12), part)
        });
        let line = LineSeries::new(points, colour.stroke_width(2));
        let legend = move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2));
        chart.draw_series(line)?.label(*name).legend(legend);
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .position(SeriesLabelPosition::LowerRight)
        .draw()?;
    Ok(())
}

/// The maps of all models, and what their colours mean.
pub(super) fn wins(path: &Path, maps: &[Map]) -> Result<(), Problem> {
    let area = SVGBackend::new(path, (1080, 600)).into_drawing_area();
    area.fill(&WHITE)?;
    let panels = area.split_evenly((2, 3));
    for (panel, map) in panels.iter().zip(maps) {
        wins_panel(panel, map)?;
    }
    if let Some(panel) = panels.get(maps.len()) {
        legend(panel)?;
    }
    area.present()?;
    Ok(())
}

fn colour(way: Way) -> RGBColor {
    match way {
        Way::Recompute => RGBColor(244, 165, 130),
        Way::Load => RGBColor(146, 197, 222),
        Way::Both => RGBColor(166, 219, 160),
        Way::Hidden => RGBColor(194, 165, 207),
    }
}

fn wins_panel(area: &Area<'_>, map: &Map) -> Result<(), Problem> {
    let ends = map.bytes_s.first().zip(map.bytes_s.get(1));
    let step = ends.map_or(2.0, |(first, second)| second / first);
    let edge = |at: usize| {
        let first = map.bytes_s.first().copied().unwrap_or(1.0);
        first * step.powf(at as f64 - 0.5) / 1e9
    };
    let contexts = map.rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(map.name, ("sans-serif", 14))
        .margin(8)
        .x_label_area_size(30)
        .y_label_area_size(44)
        .build_cartesian_2d(
            (edge(0)..edge(map.bytes_s.len())).log_scale(),
            0.0..contexts,
        )?;
    let context = |at: &f64| {
        let row = (0..map.rows.len()).find(|row| (*row as f64 + 0.5 - at).abs() < 0.3);
        let tokens = row
            .and_then(|row| map.rows.get(row))
            .map(|(tokens, _)| tokens);
        tokens.map_or(String::new(), |tokens| format!("{} Ki", tokens / 1024))
    };
    for (row, (_, points)) in map.rows.iter().enumerate() {
        let (low, high) = (row as f64, row as f64 + 1.0);
        // Neighbours of one colour are one rectangle.
        let mut from = 0;
        for run in points.chunk_by(|a, b| a.way == b.way) {
            let ends = [(edge(from), low), (edge(from + run.len()), high)];
            let way = run.first().map_or(Way::Load, |point| point.way);
            from += run.len();
            chart.draw_series([Rectangle::new(ends, colour(way).filled())])?;
        }
        let mut from = 0;
        for run in points.chunk_by(|a, b| a.is_worth_damage() == b.is_worth_damage()) {
            let line = [(edge(from), low + 0.5), (edge(from + run.len()), low + 0.5)];
            from += run.len();
            if run.first().is_some_and(Point::is_worth_damage) {
                chart.draw_series([PathElement::new(line, BLACK.stroke_width(1))])?;
            }
        }
    }
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("GB/s")
        .y_labels(2 * map.rows.len() + 1)
        .y_label_formatter(&context)
        .x_label_formatter(&|gb: &f64| format!("{gb}"))
        .draw()?;
    Ok(())
}

fn legend(area: &Area<'_>) -> Result<(), Problem> {
    let style = ("sans-serif", 13).into_font().color(&BLACK);
    let mut y = 40;
    for way in Way::ALL {
        let box_ = [(20, y), (44, y + 16)];
        area.draw(&Rectangle::new(box_, colour(way).filled()))?;
        area.draw(&Text::new(way.name(), (54, y + 2), style.clone()))?;
        y += 28;
    }
    area.draw(&PathElement::new(
        [(20, y + 8), (44, y + 8)],
        BLACK.stroke_width(1),
    ))?;
    let text = "a lossy level ends 1.5 times as early";
    area.draw(&Text::new(text, (54, y + 2), style.clone()))?;
    let notes = [
        "The simplest exact way within 5 % of the best.",
        "One GPU of 445 TFLOP/s, raw bf16, one link.",
        "Context over the bandwidth of the link.",
    ];
    for note in notes {
        y += 28;
        area.draw(&Text::new(note, (20, y + 4), style.clone()))?;
    }
    Ok(())
}
