//! A drawing of how a crowd's time grows with its size.

use std::fmt::Write as _;

/// A crowd: nodes, seconds of the median node and of the slowest.
pub type Point = (usize, f64, f64);

/// What a line shows of a point.
type Pick = fn(&Point) -> f64;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 50.0;
const BOTTOM: f64 = 40.0;
/// Seconds at the top.
const MOST: f64 = 2.4;

/// Returns the drawing as SVG: nodes on a logarithmic axis, seconds upwards, and the bar that the slowest has to stay under.
pub fn growth(points: &[Point], least: f64, bar: f64) -> String {
    let largest = points.iter().map(|(nodes, ..)| *nodes).max().unwrap_or(10) as f64;
    let x =
        |nodes: usize| LEFT + (WIDTH - LEFT - 90.0) * ((nodes as f64).log10() - 1.0) / (largest.log10() - 1.0).max(1.0);
    let y = |seconds: f64| (HEIGHT - BOTTOM) * (1.0 - seconds / MOST) + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        HEIGHT + 10.0
    );
    let mut add = |text: String| svg.push_str(&text);
    for tenths in (0..=24).step_by(5) {
        let (seconds, at) = (f64::from(tenths) / 10.0, y(f64::from(tenths) / 10.0));
        add(format!("<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.0}\" y2=\"{at:.0}\" stroke=\"#ddd\"/>\n"));
        add(format!("<text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\">{seconds:.1} s</text>\n", LEFT - 6.0, at + 4.0));
    }
    for (seconds, name) in [(bar, "bar"), (least, "least possible")] {
        let at = y(seconds);
        add(format!(
            "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.0}\" y2=\"{at:.0}\" stroke=\"#888\" stroke-dasharray=\"4 3\"/>\n\
             <text x=\"{}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"#666\">{name}</text>\n",
            WIDTH - 4.0,
            at - 4.0
        ));
    }
    for (nodes, ..) in points {
        let at = x(*nodes);
        add(format!("<text x=\"{at:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{nodes} nodes</text>\n", HEIGHT - 8.0));
    }
    let lines: [(&str, &str, Pick); 2] =
        [("slowest node", "#b03030", |point| point.2), ("median node", "#2060a0", |point| point.1)];
    for (name, colour, seconds) in lines {
        let mut path = String::new();
        for point in points {
            let (at, up) = (x(point.0), y(seconds(point)));
            let _ = write!(path, "{at:.1},{up:.1} ");
            add(format!("<circle cx=\"{at:.1}\" cy=\"{up:.1}\" r=\"3\" fill=\"{colour}\"/>\n"));
        }
        add(format!("<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>\n"));
        if let Some(last) = points.last() {
            let (at, up) = (x(last.0) + 8.0, y(seconds(last)) + 4.0);
            add(format!("<text x=\"{at:.0}\" y=\"{up:.0}\" fill=\"{colour}\">{name}</text>\n"));
        }
    }
    svg.push_str("</svg>\n");
    svg
}
