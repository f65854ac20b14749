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
    /// A challenge that asks for user and password, which are all that opens it.
    Basic,
    /// A challenge for this repository and another one, and only a token for both opens it.
    SeveralScopes,
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

impl Manner {
    /// Whether it is met by who is refused for want of a proof.
    pub(crate) fn is_of_challenges(self) -> bool {
        matches!(self, Self::NoChallenge | Self::SeveralChallenges | Self::Unquoted | Self::Basic | Self::SeveralScopes)
    }

    /// Whether it is met by who asks for a token.
    pub(crate) fn is_of_tokens(self) -> bool {
        matches!(self, Self::NoPosts | Self::NoExpiry | Self::IssuedLongAgo | Self::TokensLimited)
    }
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
