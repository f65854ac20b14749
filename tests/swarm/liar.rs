//! Members that lie. They have the key of the cluster, so all that protects from them is what the others decide.

/// How a member lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lie {
    /// It changes the bytes that it sends.
    WrongBytes,
    /// It signs hashes of wrong bytes when it has read the registry, and sends those.
    FalseVouch,
    /// It claims to have everything, and has nothing when it is asked.
    FalseMaps,
    /// It sends everybody on to others, for ever.
    Referrals,
    /// It takes asks and never says anything.
    Stalls,
    /// It promises for ever.
    Promises,
    /// It sends, but hardly.
    Drips,
    /// It asks everybody for everything, all the time.
    Floods,
    /// What it says is no message.
    HugeFrames,
}

/// All of them.
pub const ALL: [Lie; 9] = [
    Lie::WrongBytes,
    Lie::FalseVouch,
    Lie::FalseMaps,
    Lie::Referrals,
    Lie::Stalls,
    Lie::Promises,
    Lie::Drips,
    Lie::Floods,
    Lie::HugeFrames,
];
