//! The numbers of the swarm. Defaults are from docs/SWARM.md, which tells what decided them.

use std::time::Duration;

/// How much a bytes' origin has to be proved before readers get them that do not verify for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// A member's signed hash is enough.
    #[default]
    Members,
    /// Two members' equal hashes, our own registry read, or the sha256 of the whole.
    Proof,
}

/// The numbers of the swarm.
#[derive(Debug, Clone)]
pub struct Config {
    /// Pieces of an object that are asked for at once.
    pub window: usize,
    /// Pieces that are asked for at once on this node, over all objects.
    pub node_window: usize,
    /// Pieces of a group that one holder is asked for at once.
    pub run: u32,
    /// A holder with so many pieces to send is not asked.
    pub backlog: u32,
    /// Uploads of one piece at a time; the others wait in order.
    pub uploads_per_piece: usize,
    /// Members that may wait here for one piece that is on its way; further ones are sent on, if there is anybody.
    pub waiters_per_piece: usize,
    /// Uploads that have begun; the others wait in order. An upload that is older than `slow_upload` does not count.
    pub uploads: usize,
    /// Uploads that have begun, slow ones included.
    pub most_uploads: usize,
    /// Asks that wait here at most; further ones are told that we are busy.
    pub queue: usize,
    /// After this an upload's receiver is slow, and no reason to let others wait.
    pub slow_upload: Duration,
    /// The least time after which a second source is asked.
    pub hedge: Duration,
    /// A source that is silent for so long is left.
    pub silence: Duration,
    /// How often one who waits is told that it is not in vain.
    pub pending: Duration,
    /// What finishes within this time is reported together.
    pub report: Duration,
    /// How often what we hold is told to everybody at most.
    pub summary: Duration,
    /// After so long without progress a node reads the registry itself.
    pub alone: Duration,
    /// Over so long these reads are spread.
    pub alone_spread: Duration,
    /// How long a node without a view waits for one.
    pub no_view: Duration,
    /// A home that answers with promises only is left after so long, another holder after twice that.
    pub deadline: Duration,
    /// A lease is void after so long a silence.
    pub lease: Duration,
    /// How long one who refused or was silent is dead for us.
    pub dead: Duration,
    /// Over so long holders re-report after a change of the view.
    pub rereport: Duration,
    /// Within this time after its start, a home asks the next in rank before it believes that nobody has a piece.
    pub newcomer: Duration,
    /// How long a withdrawn object is still served.
    pub withdrawn: Duration,
    /// How long one whose bytes were wrong is not asked.
    pub quarantine: Duration,
    /// How long a caller's grant is fresh.
    pub grant: Duration,
    /// How long a public mark is fresh.
    pub public: Duration,
    /// How long both live on while the registry cannot be asked.
    pub grace: Duration,
    /// Bytes per second to the registry that prefetch may use on this node; zero is no limit.
    pub prefetch_rate: u64,
    /// Pieces that prefetch asks for at once on this node.
    pub prefetch_window: usize,
    /// Requests of prefetch to registries at a time, of all homes together: those beyond it take turns.
    pub prefetch_reads: usize,
    /// What is enough proof.
    pub trust: Trust,
    /// Holders that are remembered per object.
    pub neighbours: usize,
    /// Registry names that may be asked because a peer says so.
    pub registries: Vec<String>,
}

impl Config {
    /// Whether the registry of an origin may be read because a peer says so.
    pub fn reads(&self, origin: &str) -> bool {
        let registry = origin.split('/').next().unwrap_or_default();
        self.registries.iter().any(|known| known == registry)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window: 6,
            node_window: 12,
            run: 4,
            backlog: 4,
            uploads_per_piece: 3,
            waiters_per_piece: 3,
            uploads: 4,
            most_uploads: 64,
            queue: 256,
            slow_upload: Duration::from_millis(100),
            hedge: Duration::from_millis(30),
            silence: Duration::from_millis(250),
            pending: Duration::from_millis(100),
            report: Duration::from_millis(25),
            summary: Duration::from_secs(10),
            alone: Duration::from_secs(2),
            alone_spread: Duration::from_secs(2),
            no_view: Duration::from_secs(1),
            deadline: Duration::from_secs(3),
            lease: Duration::from_millis(250),
            dead: Duration::from_secs(20),
            rereport: Duration::from_millis(500),
            newcomer: Duration::from_secs(60),
            withdrawn: Duration::from_secs(10),
            quarantine: Duration::from_secs(3600),
            grant: Duration::from_secs(300),
            public: Duration::from_secs(3600),
            grace: Duration::from_secs(3600),
            prefetch_rate: 0,
            prefetch_window: 6,
            prefetch_reads: 4,
            trust: Trust::Members,
            neighbours: 32,
            registries: Vec::new(),
        }
    }
}
