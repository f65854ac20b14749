//! `shoal-swarm`: runs a scenario, or prints the tables of docs/SWARM.md.
#![expect(clippy::print_stdout, reason = "it is a program that prints tables")]

use clap::Parser;
use nydus_swarm::Scenario;

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
    /// Bytes per second of a card.
    #[arg(long, default_value_t = 125_000_000)]
    rate: u64,
}

fn main() {
    let options = Options::parse();
    let mut scenarios = vec![Scenario::crowd(options.nodes)];
    if let Some(name) = &options.scenario {
        scenarios = Scenario::all(options.nodes)
            .into_iter()
            .chain([Scenario::many_objects(options.nodes)])
            .filter(|scenario| scenario.name.contains(name.as_str()))
            .collect();
    }
    for mut scenario in scenarios {
        scenario.rate = options.rate;
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
            for wrong in &outcome.wrongs {
                println!("  WRONG: {wrong}");
            }
        }
    }
}
