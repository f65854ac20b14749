//! `WWW-Authenticate`: what a registry wants to see before it answers.
//!
//! One header may hold several challenges, and one answer several headers. Values may be quoted or not, and
//! a comma separates both parameters and challenges, so a word is a new scheme only if no `=` follows it.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// One thing that a registry would accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// A user and password.
    Basic,
    /// A token from a token service.
    Bearer {
        /// The URL of the token service.
        realm: String,
        /// What the token service calls the registry, if it is told.
        service: Option<String>,
        /// What to ask for, separated by spaces, if it is told.
        scope: Option<String>,
    },
}

/// Returns all challenges of an answer that we understand, in order.
pub fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).flat_map(parse).collect()
}

/// Returns all challenges of one header that we understand, in order.
fn parse(text: &str) -> Vec<Challenge> {
    let mut found: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([',', ' ', '\t']);
        if rest.is_empty() {
            break;
        }
        let word = take_word(&mut rest);
        if word.is_empty() {
            // Not a word: skip one character rather than loop for ever.
            let mut characters = rest.chars();
            characters.next();
            rest = characters.as_str();
            continue;
        }
        let after = rest.trim_start();
        match after.strip_prefix('=') {
            // `Basic =`: an `=` is part of a parameter only if parameters are possible here.
            Some(value) if !found.is_empty() => {
                rest = value.trim_start();
                let value = take_value(&mut rest);
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.push((word.to_ascii_lowercase(), value));
                }
            }
            _ => found.push((word.to_ascii_lowercase(), Vec::new())),
        }
    }
    found.into_iter().filter_map(|(scheme, parameters)| challenge(&scheme, parameters)).collect()
}

fn challenge(scheme: &str, parameters: Vec<(String, String)>) -> Option<Challenge> {
    let take = |wanted: &str| {
        parameters.iter().find(|(name, value)| name == wanted && !value.is_empty()).map(|(_, value)| value.clone())
    };
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer { realm: take("realm")?, service: take("service"), scope: take("scope") }),
        _ => None,
    }
}

fn take_word<'t>(rest: &mut &'t str) -> &'t str {
    let end = rest.find([',', ' ', '\t', '=', '"']).unwrap_or(rest.len());
    let (word, remainder) = rest.split_at(end);
    *rest = remainder;
    word
}

fn take_value(rest: &mut &str) -> String {
    let Some(quoted) = rest.strip_prefix('"') else {
        // Unquoted values of URLs hold `=`, so only separators end them.
        let end = rest.find([',', ' ', '\t']).unwrap_or(rest.len());
        let (value, remainder) = rest.split_at(end);
        let value = value.to_owned();
        *rest = remainder;
        return value;
    };
    let mut value = String::new();
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    *rest = characters.as_str();
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn challenges_are_read_quoted_unquoted_and_several_at_once() {
        let full = bearer("https://a.example/token?x=1", Some("r"), Some("repository:a/b:pull,push"));
        for (text, expected) in [
            (
                r#"Bearer realm="https://a.example/token?x=1",service="r",scope="repository:a/b:pull,push""#,
                vec![full.clone()],
            ),
            (
                r#"bearer  REALM = "https://a.example/token?x=1" , service=r , scope="repository:a/b:pull,push""#,
                vec![full.clone()],
            ),
            ("Bearer realm=https://a.example/t,service=r", vec![bearer("https://a.example/t", Some("r"), None)]),
            (
                r#"Basic realm="x, y", Bearer realm="https://t",service="s""#,
                vec![Challenge::Basic, bearer("https://t", Some("s"), None)],
            ),
            (r#"Negotiate, Basic"#, vec![Challenge::Basic]),
            (r#"Bearer service="without realm""#, vec![]),
            (r#"Bearer realm="a\"b""#, vec![bearer("a\"b", None, None)]),
            ("", vec![]),
            (r#"Bearer realm="unterminated"#, vec![bearer("unterminated", None, None)]),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,80}") {
            parse(&text);
        }

        #[test]
        fn any_quoted_challenge_comes_back(realm in "[a-z:/.?=,\" ]{1,30}", service in "[a-z. ,=]{1,10}") {
            let quoted = realm.replace('"', "\\\"");
            let text = format!("Basic realm=\"q\", Bearer realm=\"{quoted}\",service=\"{service}\"");
            prop_assert_eq!(parse(&text), vec![Challenge::Basic, bearer(&realm, Some(&service), None)]);
        }
    }
}
