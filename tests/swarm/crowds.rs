//! What the swarm promises, held against simulated crowds. A seed that ever failed is named in a test of its own.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use nydus_swarm::bar::CROWD;
use nydus_swarm::{Bar, Outcome, Scenario};

/// Runs seeds on all cores; returns what each came to.
fn run(scenario: &Scenario, seeds: u64) -> Vec<(u64, Outcome)> {
    let next = AtomicU64::new(0);
    let outcomes = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    let outcome = scenario.run(seed);
                    outcomes.lock().expect("no test thread panics with it").push((seed, outcome));
                }
            });
        }
    });
    outcomes.into_inner().expect("no test thread panics with it")
}

#[track_caller]
fn holds(scenario: &Scenario, seeds: u64, bar: Bar) {
    for (seed, outcome) in run(scenario, seeds) {
        let what = format!("{}, {} nodes, seed {seed}", scenario.name, scenario.nodes);
        assert!(outcome.wrongs.is_empty(), "{what}: {:#?}", outcome.wrongs);
        let over = bar.over(&outcome);
        assert!(over.is_empty(), "{what}: {over:?}; {:?}", outcome.kinds);
    }
}

fn named(nodes: usize, name: &str) -> Scenario {
    let mut all = Scenario::all(nodes).into_iter();
    all.find(|scenario| scenario.name == name).unwrap_or_else(|| panic!("there is no scenario {name}"))
}

#[test]
fn a_crowd_of_four_ten_or_a_hundred_takes_each_byte_from_the_registry_once() {
    for nodes in [4, 10, 100] {
        holds(&Scenario::crowd(nodes), 20, CROWD);
    }
}

#[test]
fn a_crowd_of_a_thousand_takes_each_byte_from_the_registry_once() {
    holds(&Scenario::crowd(1000), 3, CROWD);
}

#[test]
fn homes_that_die_cost_a_tenth_and_no_read() {
    holds(&named(100, "kill homes"), 20, Bar { egress: 1.10, ..CROWD });
    holds(&named(1000, "kill homes"), 1, Bar { egress: 1.10, ..CROWD });
}

#[test]
fn ten_nodes_become_a_thousand_within_five_seconds() {
    let storm = named(1000, "join storm");
    holds(&storm, 1, Bar::of(&storm));
}

#[test]
fn whatever_goes_wrong_nobody_is_stranded_or_fooled() {
    for (nodes, seeds) in [(10, 8), (100, 1)] {
        for scenario in Scenario::all(nodes) {
            holds(&scenario, seeds, Bar::of(&scenario));
        }
    }
}

#[test]
fn a_thousand_objects_are_fetched_side_by_side() {
    holds(&Scenario::many_objects(4), 2, Bar { seconds: 12.0, messages: 6.0, stall: 12.0, ..CROWD });
}

#[test]
fn a_piece_that_was_asked_for_in_vain_does_not_only_wait_its_turn() {
    // These were stranded: whenever the window was full, the patience of such pieces began anew.
    for (name, seed) in [("partition", 4), ("lie: Busy", 18)] {
        let scenario = named(10, name);
        let outcome = scenario.run(seed);
        assert!(outcome.wrongs.is_empty(), "{name}: {:#?}", outcome.wrongs);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for name in ["crowd", "kill homes", "lie: Floods"] {
        let scenario = named(20, name);
        let [one, same, other] = [1, 1, 2].map(|seed| scenario.run(seed));
        assert_eq!((one.fingerprint, one.egress, one.messages), (same.fingerprint, same.egress, same.messages));
        assert_ne!(one.fingerprint, other.fingerprint);
    }
}
