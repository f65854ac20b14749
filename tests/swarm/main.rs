//! `shoal-swarm`: runs a scenario, or prints the tables of docs/SWARM.md.
#![expect(clippy::print_stdout, reason = "it is a program that prints tables")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use nydus_swarm::{Bar, Outcome, Scenario};

/// Simulates crowds of nodes.
#[derive(Debug, Parser)]
struct Options {
    /// Nodes.
    #[arg(long, default_value_t = 100)]
    nodes: usize,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Prints the messages by kind.
    #[arg(long)]
    kinds: bool,
    /// Seeds.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Readers read in order.
    #[arg(long)]
    stream: bool,
    /// Runs every scenario whose name contains this.
    #[arg(long)]
    scenario: Option<String>,
    /// Instead: draws how a crowd's time grows from ten nodes to `--nodes`, into this file, and prints the table.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Bytes per second of a card.
    #[arg(long)]
    rate: Option<u64>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(path) = &options.plot {
        return plot(path, options.nodes, options.seeds);
    }
    let mut scenarios = vec![Scenario::crowd(options.nodes)];
    if let Some(name) = &options.scenario {
        scenarios = Scenario::all(options.nodes)
            .into_iter()
            // That is much work for many nodes, and has to be asked for.
            .chain((!name.is_empty() || options.nodes <= 10).then(|| Scenario::many_objects(options.nodes)))
            .filter(|scenario| scenario.name.contains(name.as_str()))
            .collect();
    }
    let mut bad = 0;
    for mut scenario in scenarios {
        scenario.rate = options.rate.unwrap_or(scenario.rate);
        if options.stream {
            scenario.order = nydus_backend::swarm::port::Order::InOrder;
        }
        for seed in options.first..options.first + options.seeds {
            let begin = std::time::Instant::now();
            let outcome = scenario.run(seed);
            println!(
                "{:20} seed {seed}: egress {:.3} slowest {:.2} s median {:.2} last {:.2} stall {:.2} msgs {:.2} busiest {} reqs {} ({} sent away) given {} {:?} in {:.1?}",
                scenario.name,
                outcome.egress_ratio(),
                outcome.slowest_seconds(),
                outcome.median as f64 / 1e6,
                outcome.last as f64 / 1e6,
                outcome.longest_stall as f64 / 1e6,
                outcome.messages_per_piece(),
                outcome.busiest,
                outcome.requests,
                outcome.refused,
                outcome.most_given >> 20,
                outcome.events,
                begin.elapsed()
            );
            if options.kinds {
                println!("  {:?}", outcome.kinds);
            }
            if scenario.urgent > 0 {
                println!("  what was waited for was there after {:.2} s", outcome.urgent as f64 / 1e6);
            }
            let over = Bar::of(&scenario).over(&outcome);
            for wrong in outcome.wrongs.iter().chain(&over) {
                println!("  WRONG: {wrong}");
            }
            bad += outcome.wrongs.len() + over.len();
        }
    }
    if bad > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs crowds of ten, a hundred and so on, and draws the worst of their seeds.
fn plot(path: &Path, largest: usize, seeds: u64) -> ExitCode {
    let mut points = Vec::new();
    println!("| nodes | registry egress | requests | slowest node | last node | messages per piece | busiest node |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for nodes in std::iter::successors(Some(10), |nodes| Some(nodes * 10)).take_while(|nodes| *nodes <= largest) {
        let scenario = Scenario::crowd(nodes);
        // The largest crowds take minutes and gigabytes.
        let seeds = if nodes > 1000 { 1 } else { seeds };
        let outcomes: Vec<_> = (0..seeds).map(|seed| scenario.run(seed)).collect();
        let most = |figure: fn(&Outcome) -> f64| outcomes.iter().map(figure).fold(0.0, f64::max);
        let (median, slowest) = (most(|outcome| outcome.median as f64 / 1e6), most(Outcome::slowest_seconds));
        println!(
            "| {nodes} | {:.3}x | {} | {slowest:.2} s | {:.1} s | {:.1} | {} |",
            most(Outcome::egress_ratio),
            most(|outcome| outcome.requests as f64),
            most(|outcome| outcome.last as f64 / 1e6),
            most(Outcome::messages_per_piece),
            most(|outcome| outcome.busiest as f64),
        );
        points.push((nodes, median, slowest));
    }
    let scenario = Scenario::crowd(10);
    let least = f64::from(scenario.pieces) * f64::from(1 << 20) / scenario.rate as f64;
    match std::fs::write(path, nydus_swarm::plot::growth(&points, least, nydus_swarm::bar::CROWD.seconds)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("could not write {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
