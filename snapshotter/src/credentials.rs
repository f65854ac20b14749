//! Who we are to a registry.
//!
//! The labels of the pull come first, then docker's configuration; the first answer wins, and none means anonymous.

use nydus_backend::credentials::Credential;

use crate::labels::PullSecret;

/// Credentials in the two forms that nydusd takes.
#[derive(Clone, PartialEq, Eq)]
pub enum Found {
    /// A name and password.
    Basic {
        /// Name.
        user: String,
        /// Password.
        password: String,
    },
    /// A bearer token.
    Token(String),
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(..)",
            Self::Token(_) => "Token(..)",
        })
    }
}

/// Looks for credentials for `registry`, a host as image references write it.
///
/// May run a credential helper, which is a program: for threads that may block.
pub fn find(from_labels: Option<&PullSecret>, registry: &str) -> Option<Found> {
    if let Some(PullSecret { user, secret }) = from_labels {
        return Some(if user.is_empty() {
            Found::Token(secret.clone())
        } else {
            Found::Basic { user: user.clone(), password: secret.clone() }
        });
    }
    match Credential::from_docker_config(registry) {
        Ok(Credential::Basic { user, password }) => return Some(Found::Basic { user, password }),
        Ok(Credential::Bearer(token)) => return Some(Found::Token(token)),
        Ok(Credential::Identity(_)) => {
            tracing::warn!(registry, "docker's configuration has an identity token, which nydusd cannot use");
        }
        Ok(Credential::Anonymous) => {}
        Err(error) => tracing::warn!(registry, %error, "docker's configuration could not be used"),
    }
    tracing::warn!(
        registry,
        "no credentials in the pull's labels or in docker's configuration: the registry is asked anonymously"
    );
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_win_and_a_secret_without_a_name_is_a_token() {
        let named = PullSecret { user: "me".into(), secret: "s".into() };
        assert_eq!(find(Some(&named), "r.example"), Some(Found::Basic { user: "me".into(), password: "s".into() }));
        let token = PullSecret { user: String::new(), secret: "t".into() };
        assert_eq!(find(Some(&token), "r.example"), Some(Found::Token("t".into())));
    }
}
