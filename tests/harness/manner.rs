//! What a front does in another way than usual, within what registries do.

use axum::http::StatusCode;

/// A way to redirect, to challenge, or to give tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Manner {
    /// 307 to the store; a challenge with a quoted realm, service and scope; tokens with the seconds of their life.
    #[default]
    Usual,
    /// This status instead of 307.
    Redirects(StatusCode),
    /// First to another path of the registry, and only from there to the store.
    Relative,
    /// So many times from the store to itself.
    Hops(u32),
    /// 401 with no challenge.
    NoChallenge,
    /// A challenge of another kind before the usual one.
    SeveralChallenges,
    /// A challenge without quotes.
    Unquoted,
    /// The token service takes no POST.
    NoPosts,
    /// Tokens do not say how long they live.
    NoExpiry,
    /// Tokens say that they were given out years ago.
    IssuedLongAgo,
    /// The token service answers 429 and asks for a pause until a date.
    TokensLimited,
    /// To a store that speaks HTTP/2.
    Multiplexed(Temper),
}

/// What a store with HTTP/2 does to the first requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Temper {
    /// Answers them.
    Good,
    /// Says that it goes, without having looked at them.
    Goes,
    /// Resets their streams before the head of an answer.
    Resets,
    /// Resets their streams in the middle of a body.
    ResetsBodies,
    /// Answers pings, and not them.
    Silent,
}
