//! Who we are to a registry.
//!
//! The labels of the pull come first, then what kubelet pulled with ([`crate::keychain`]), then docker's configuration; the
//! first answer wins, and none means anonymous. When a registry refuses what an image was mounted with, every answer counts that
//! was not refused yet.

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

impl From<&PullSecret> for Found {
    fn from(PullSecret { user, secret }: &PullSecret) -> Self {
        if user.is_empty() {
            Self::Token(secret.clone())
        } else {
            Self::Basic { user: user.clone(), password: secret.clone() }
        }
    }
}

/// Looks for credentials for `registry`, a host as image references write it.
///
/// May run a credential helper, which is a program: for threads that may block.
pub fn find(from_labels: Option<&PullSecret>, registry: &str) -> Option<Found> {
    let found = from_labels.map(Found::from).or_else(|| from_docker(registry));
    if found.is_none() {
        tracing::warn!(
            registry,
            "no credentials in the pull's labels or in docker's configuration: the registry is asked anonymously"
        );
    }
    found
}

/// Looks for credentials that are none of `refused`: in the labels of pulls, the first first, then in docker's configuration
/// as it is now.
///
/// May run a credential helper, as [`find`].
pub fn find_other(pulls: &[PullSecret], registry: &str, refused: &[Found]) -> Option<Found> {
    let fresh = |found: &Found| !refused.contains(found);
    pulls.iter().map(Found::from).find(fresh).or_else(|| from_docker(registry).filter(fresh))
}

fn from_docker(registry: &str) -> Option<Found> {
    match Credential::from_docker_config(registry) {
        Ok(Credential::Basic { user, password }) => return Some(Found::Basic { user, password }),
        Ok(Credential::Bearer(token)) => return Some(Found::Token(token)),
        Ok(Credential::Identity(_)) => {
            tracing::warn!(registry, "docker's configuration has an identity token, which nydusd cannot use");
        }
        Ok(Credential::Anonymous) => {}
        Err(error) => tracing::warn!(registry, %error, "docker's configuration could not be used"),
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(secret: &str) -> PullSecret {
        PullSecret { user: "me".into(), secret: secret.into() }
    }

    #[test]
    fn labels_win_and_a_secret_without_a_name_is_a_token() {
        let want = Found::Basic { user: "me".into(), password: "s".into() };
        assert_eq!(find(Some(&named("s")), "r.example"), Some(want));
        let token = PullSecret { user: String::new(), secret: "t".into() };
        assert_eq!(find(Some(&token), "r.example"), Some(Found::Token("t".into())));
    }

    #[test]
    fn what_was_refused_is_not_found_again() {
        let pulls = [named("new"), named("old")];
        let [new, old] = [Found::from(&pulls[0]), Found::from(&pulls[1])];
        assert_eq!(find_other(&pulls, "r.invalid", &[]), Some(new.clone()));
        assert_eq!(find_other(&pulls, "r.invalid", std::slice::from_ref(&new)), Some(old.clone()));
        assert_eq!(find_other(&pulls, "r.invalid", &[new, old]), None);
    }
}
