//! What a scenario may cost at most: as much as the crowd itself, and where a fault makes something dearer, how much.

use crate::liar::Lie;
use crate::{Outcome, Scenario};

/// The most that a run may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// Registry bytes in multiples of what was wanted.
    pub egress: f64,
    /// Seconds of the slowest node, from its own start.
    pub seconds: f64,
    /// Control messages per piece and node.
    pub messages: f64,
    /// Seconds without any byte for a reader.
    pub stall: f64,
    /// Seconds until the slowest has what it waits for, where other things are only prefetched.
    pub urgent: f64,
}

/// A crowd with nothing wrong.
pub const CROWD: Bar = Bar { egress: 1.01, seconds: 2.2, messages: 3.0, stall: 1.0, urgent: f64::MAX };

impl Bar {
    /// Returns what a scenario may cost.
    pub fn of(scenario: &Scenario) -> Self {
        let few = scenario.nodes < 100;
        match scenario.name.as_str() {
            // One of ten that dies takes a tenth of what only it had with it, and two of ten die with `homes`.
            "kill" | "kill homes" | "kill homes early" => Self { egress: if few { 1.25 } else { 1.10 }, ..CROWD },
            // In order, the front of the crowd waits for the registry group by group, and everybody behind it bunches up.
            "stream" => Self { seconds: if scenario.nodes > 100 { 3.0 } else { 2.2 }, messages: 5.5, ..CROWD },
            // Each side reads what it lacks; twice is the least where nobody has anything yet.
            "partition" => Self { egress: 2.1, seconds: 3.0, ..CROWD },
            // A thousand who join have ten settled homes for the first five seconds.
            "join storm" if scenario.nodes > 100 => Self { egress: 1.01, seconds: 5.5, stall: 2.1, ..CROWD },
            "join storm" => Self { egress: 1.10, seconds: 2.6, ..CROWD },
            // The slow node itself needs 17 s for 100 MiB, and is the home of some of it.
            "slow nodes" => Self { egress: 1.10, seconds: 20.0, messages: 5.0, stall: 6.0, ..CROWD },
            "slow registry" => Self { seconds: 5.0, stall: 1.5, ..CROWD },
            "429" => Self { egress: 1.05, seconds: 5.5, messages: 5.5, stall: 3.5, ..CROWD },
            // It is away for two seconds.
            "registry down" => Self { egress: 1.4, seconds: 7.0, messages: 6.5, stall: 5.0, ..CROWD },
            "tokens" | "strangers" => Self { egress: 1.05, ..CROWD },
            // A fifth of the nodes dies, of ten half.
            "tokens, kill" => Self { egress: if few { 1.5 } else { 1.25 }, ..CROWD },
            "a thousand objects" => Self { seconds: 12.0, messages: 6.0, stall: 12.0, ..CROWD },
            "split views" => Self { egress: 1.25, ..CROWD },
            "full disks" => Self { egress: 1.10, ..CROWD },
            "eviction" => Self { egress: 1.15, ..CROWD },
            "late eviction" => Self { egress: 1.10, ..CROWD },
            "busy homes" => Self { egress: 1.02, seconds: 4.0, messages: 12.0, stall: 2.0, ..CROWD },
            // Homes take turns, and nobody waits.
            "prefetch" => Self { seconds: 4.0, messages: 3.5, ..CROWD },
            // All of it needs 3.2 s, what is waited for a third of that.
            "demand beside prefetch" => {
                Self { egress: 1.15, seconds: 9.0, messages: 9.0, stall: 3.0, urgent: if few { 3.0 } else { 4.0 } }
            }
            // A third of the nodes dies, of ten nearly all, and each takes 2 s for what it reads.
            "weak links" => {
                Self { egress: if few { 2.5 } else { 1.5 }, seconds: 9.0, messages: 22.0, stall: 5.0, ..CROWD }
            }
            _ => match scenario.lie {
                Some(Lie::WrongBytes) => Self { egress: 1.3, messages: 4.0, ..CROWD },
                // Every reader has to find out for itself that the signer lied.
                Some(Lie::FalseVouch) => Self { egress: if few { 3.3 } else { 4.6 }, ..CROWD },
                Some(Lie::Promises) => Self { egress: 1.15, seconds: 10.0, messages: 6.5, stall: 6.6, ..CROWD },
                Some(Lie::Drips) => Self { egress: 1.15, seconds: 9.0, messages: 5.0, stall: 6.0, ..CROWD },
                Some(Lie::Busy) => Self { egress: 1.3, seconds: 9.0, messages: 8.0, stall: 6.0, ..CROWD },
                Some(Lie::Floods) => Self { egress: 1.15, seconds: 4.0, messages: 5.0, ..CROWD },
                Some(_) => Self { egress: 1.3, messages: 4.0, ..CROWD },
                None => CROWD,
            },
        }
    }

    /// Tells in words where a run cost more.
    pub fn over(&self, outcome: &Outcome) -> Vec<String> {
        [
            ("times the bytes from the registry", outcome.egress_ratio(), self.egress),
            ("s until the slowest was done", outcome.slowest_seconds(), self.seconds),
            ("messages per piece", outcome.messages_per_piece(), self.messages),
            ("s without a byte", outcome.longest_stall as f64 / 1e6, self.stall),
            ("s until the slowest had what it waited for", outcome.urgent as f64 / 1e6, self.urgent),
        ]
        .into_iter()
        .filter(|(_, was, most)| was > most)
        .map(|(what, was, most)| format!("{was:.3} {what}, at most {most}"))
        .collect()
    }
}
