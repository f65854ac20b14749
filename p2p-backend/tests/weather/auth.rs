//! Proving who we are, to registries that ask in every way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use http::HeaderValue;
use nydus_backend::Credential;
use nydus_backend::registry::{BlobRequest, Client, ClientOptions, RegistryError, Scheme};

use crate::server::{How, Reply, Seen, Server, client, digest, hasty, sample};

fn user() -> Credential {
    Credential::Basic { user: "me".into(), password: "secret".into() }
}

/// `me:secret`.
const BASIC: &str = "Basic bWU6c2VjcmV0";

fn with_user() -> ClientOptions {
    ClientOptions { credential: user(), ..ClientOptions::default() }
}

fn token(text: &str) -> Reply {
    Reply::new(200).body(format!(r#"{{"token":"{text}","expires_in":300}}"#))
}

/// A registry that gives `sample(100)` to whoever shows `expected`, and else a challenge.
fn guarded(challenge: String, expected: &'static str) -> impl Fn(&Seen) -> Reply + Send + Sync {
    move |seen: &Seen| {
        if seen.header("authorization") == expected {
            Reply::ranged(seen, &sample(100))
        } else {
            Reply::new(401).header("WWW-Authenticate", challenge.clone())
        }
    }
}

async fn read(client: &Client) -> Result<bytes::Bytes, RegistryError> {
    client.blob_range("a/b", &digest(b"any"), 10..20).await
}

#[tokio::test]
async fn a_basic_challenge_is_answered_and_the_answer_remembered() {
    let registry = Server::start(guarded("Basic realm=\"r\"".into(), BASIC)).await;
    let client = client(&registry.host(), with_user());
    assert_eq!(read(&client).await.unwrap(), sample(100).slice(10..20));
    read(&client).await.unwrap();
    assert_eq!(registry.seen().len(), 3);
}

#[tokio::test]
async fn the_challenge_that_can_be_answered_is_found_among_several_headers() {
    let service = Server::start(|_| token("good")).await;
    let bearer = format!("Bearer realm={}, service=s", service.url("/t"));
    let registry = Server::start(move |seen: &Seen| match seen.header("authorization") {
        "Bearer good" => Reply::ranged(seen, &sample(100)),
        _ => Reply::new(401)
            .header("WWW-Authenticate", "Negotiate")
            .header("WWW-Authenticate", "Digest realm=\"x\", nonce=\"Bearer realm=y\"")
            .header("WWW-Authenticate", bearer.clone()),
    })
    .await;
    read(&client(&registry.host(), with_user())).await.unwrap();
    // Without one there is nothing to answer, and the error says so.
    let mute = Server::start(|_| Reply::new(401)).await;
    let error = read(&client(&mute.host(), with_user())).await.unwrap_err();
    assert_eq!((error.status().unwrap().as_u16(), mute.seen().len()), (401, 1));
}

#[tokio::test]
async fn several_scopes_are_asked_for_together() {
    let service = Server::start(|seen| if seen.method == "GET" { token("good") } else { Reply::new(404) }).await;
    let challenge =
        format!("Bearer realm=\"{}\",scope=\"repository:a/b:pull repository:base/image:pull\"", service.url("/t"));
    let registry = Server::start(guarded(challenge, "Bearer good")).await;
    read(&client(&registry.host(), with_user())).await.unwrap();
    let asked = service.seen();
    let form = asked[0].form();
    assert_eq!(form["scope"], "repository:a/b:pull repository:base/image:pull");
    // In a query each is a parameter of its own.
    let query = &asked[1].target;
    assert_eq!(query.matches("scope=").count(), 2, "{query}");
}

#[tokio::test]
async fn a_token_without_its_life_or_with_a_wrong_clock_is_used_again() {
    for answer in [
        r#"{"token":"good"}"#,
        r#"{"token":"good","expires_in":300,"issued_at":"1999-01-01T00:00:00Z"}"#,
        r#"{"access_token":"good","expires_in":300,"issued_at":"2999-01-01T00:00:00Z"}"#,
        r#"{"token":"good","expires_in":0,"issued_at":"not a date"}"#,
    ] {
        let service = Server::start(move |_| Reply::new(200).body(answer)).await;
        let registry = Server::start(guarded(format!("Bearer realm=\"{}\"", service.url("/t")), "Bearer good")).await;
        let client = client(&registry.host(), with_user());
        for _ in 0..3 {
            read(&client).await.unwrap();
        }
        assert_eq!(service.seen().len(), 1, "{answer}");
    }
}

#[tokio::test]
async fn a_wrong_password_is_shown_once_and_the_error_names_the_answer() {
    let registry = Server::start(guarded("Basic realm=\"r\"".into(), "Basic other")).await;
    let client = client(&registry.host(), with_user());
    let error = read(&client).await.unwrap_err();
    assert_eq!(error.status().unwrap(), 401);
    assert_eq!(registry.seen().iter().filter(|seen| !seen.header("authorization").is_empty()).count(), 1);
    assert!(!error.to_string().contains("secret"));
}

#[tokio::test]
async fn a_token_is_fetched_once_for_many_readers_with_user_scope_and_service() {
    let service = Server::start(|_| token("good")).await;
    let challenge = format!(
        r#"Basic realm="x", Bearer realm={},service="reg istry",scope="repository:a/b:pull""#,
        service.url("/t?x=1")
    );
    let registry = Server::start(guarded(challenge, "Bearer good")).await;
    let client = client(&registry.host(), with_user());
    let readers: Vec<_> = (0..32).map(|_| read(&client)).collect();
    for outcome in futures::future::join_all(readers).await {
        assert_eq!(outcome.unwrap(), sample(100).slice(10..20));
    }
    let asked = service.seen();
    assert_eq!(asked.len(), 1);
    let form = asked[0].form();
    assert_eq!((asked[0].method.as_str(), asked[0].header("authorization")), ("POST", BASIC));
    assert_eq!(asked[0].query()["x"], "1");
    for (key, value) in [
        ("service", "reg istry"),
        ("scope", "repository:a/b:pull"),
        ("grant_type", "password"),
        ("username", "me"),
        ("password", "secret"),
    ] {
        assert_eq!(form[key], value);
    }
    assert!(!form["client_id"].is_empty());
}

#[tokio::test]
async fn a_service_that_refuses_post_is_asked_with_get_from_then_on() {
    let rounds = Arc::new(AtomicUsize::new(0));
    for refusal in [Reply::new(405), Reply::new(404), Reply::new(200).body("<html>"), Reply::new(500).how(How::Slam)] {
        let service =
            Server::start(move |seen| if seen.method == "GET" { token("good") } else { refusal.clone() }).await;
        let registry =
            Server::start(guarded(format!("Bearer realm=\"{}\",service=s", service.url("/t")), "Bearer good")).await;
        let client = client(&registry.host(), with_user());
        read(&client).await.unwrap();
        let got = service.seen().pop().unwrap();
        assert_eq!((got.method.as_str(), got.header("authorization")), ("GET", BASIC));
        assert_eq!(got.query()["scope"], "repository:a/b:pull");
        assert_eq!(got.query()["service"], "s");
        rounds.fetch_add(1, SeqCst);
    }
    assert_eq!(rounds.load(SeqCst), 4);
}

#[tokio::test]
async fn an_anonymous_token_needs_no_user() {
    let service = Server::start(|seen| if seen.method == "GET" { token("good") } else { Reply::new(400) }).await;
    let registry = Server::start(guarded(format!("Bearer realm=\"{}\"", service.url("/t")), "Bearer good")).await;
    read(&registry.client()).await.unwrap();
    assert!(service.seen().iter().all(|seen| seen.header("authorization").is_empty()));
}

/// The token changes after three reads, and the old one is refused in the given way.
async fn expiry(refusal: fn(String) -> Reply) {
    let served = Arc::new(AtomicUsize::new(0));
    let current = Arc::clone(&served);
    let service = Server::start(move |_| token(&format!("t{}", current.load(SeqCst) / 3))).await;
    let challenge = format!("Bearer realm=\"{}\"", service.url("/t"));
    let registry = Server::start(move |seen: &Seen| {
        let wanted = format!("Bearer t{}", served.load(SeqCst) / 3);
        match seen.header("authorization") {
            proof if proof == wanted => {
                served.fetch_add(1, SeqCst);
                Reply::ranged(seen, &sample(100))
            }
            "" => Reply::new(401).header("WWW-Authenticate", challenge.clone()),
            _ => refusal(challenge.clone()),
        }
    })
    .await;
    let client = client(&registry.host(), with_user());
    for _ in 0..7 {
        read(&client).await.unwrap();
    }
    assert_eq!(service.seen().len(), 3);
}

#[tokio::test]
async fn a_token_that_expires_between_reads_is_replaced_at_once() {
    expiry(|challenge| Reply::new(401).header("WWW-Authenticate", challenge)).await;
}

#[tokio::test]
async fn a_stale_token_refused_without_a_challenge_is_replaced_as_well() {
    expiry(|_| Reply::new(401)).await;
}

#[tokio::test]
async fn a_stale_token_is_replaced_although_the_registry_never_challenges_again() {
    let served = Arc::new(AtomicUsize::new(0));
    let current = Arc::clone(&served);
    let service = Server::start(move |_| token(&format!("t{}", current.load(SeqCst) / 3))).await;
    let challenge = format!("Bearer realm=\"{}\"", service.url("/t"));
    let registry = Server::start(move |seen: &Seen| {
        let so_far = served.load(SeqCst);
        if seen.header("authorization") == format!("Bearer t{}", so_far / 3) {
            served.fetch_add(1, SeqCst);
            return Reply::ranged(seen, &sample(100));
        }
        let refusal = Reply::new(401);
        if so_far == 0 { refusal.header("WWW-Authenticate", challenge.clone()) } else { refusal }
    })
    .await;
    let client = client(&registry.host(), with_user());
    for _ in 0..7 {
        read(&client).await.unwrap();
    }
    assert_eq!(service.seen().len(), 3);
}

#[tokio::test]
async fn a_registry_that_refuses_every_token_is_asked_three_times() {
    let service = Server::start(|_| token("bad")).await;
    let registry = Server::start(guarded(format!("Bearer realm=\"{}\"", service.url("/t")), "Bearer good")).await;
    let error = read(&registry.client()).await.unwrap_err();
    assert_eq!(error.status().unwrap(), 401);
    assert_eq!(registry.seen().len(), 3);
}

#[tokio::test]
async fn a_failure_of_the_token_service_is_not_remembered() {
    let calls = AtomicUsize::new(0);
    let service = Server::start(move |_| match calls.fetch_add(1, SeqCst) {
        0 => Reply::new(429).header("Retry-After", "7"),
        _ => token("good"),
    })
    .await;
    let registry = Server::start(guarded(format!("Bearer realm=\"{}\"", service.url("/t")), "Bearer good")).await;
    let client = registry.client();
    let error = read(&client).await.unwrap_err();
    assert_eq!(error.retry_after().unwrap().as_secs(), 7);
    assert!(error.to_string().contains(&service.host()), "{error}");
    read(&client).await.unwrap();
}

#[tokio::test]
async fn a_static_token_is_used_until_it_is_refused() {
    let service = Server::start(|_| token("fresh")).await;
    let challenge = format!("Bearer realm=\"{}\"", service.url("/t"));
    let reads = AtomicUsize::new(0);
    let registry = Server::start(move |seen: &Seen| {
        let wanted = if reads.load(SeqCst) < 2 { "Bearer static" } else { "Bearer fresh" };
        if seen.header("authorization") == wanted {
            reads.fetch_add(1, SeqCst);
            Reply::ranged(seen, &sample(100))
        } else {
            Reply::new(401).header("WWW-Authenticate", challenge.clone())
        }
    })
    .await;
    let options = ClientOptions { credential: Credential::Bearer(" static\n".into()), ..ClientOptions::default() };
    let client = client(&registry.host(), options);
    for _ in 0..4 {
        read(&client).await.unwrap();
    }
    assert_eq!((registry.seen().len(), service.seen().len()), (5, 1));
}

#[tokio::test]
async fn a_credential_does_not_travel_in_plain_text_to_the_token_service_of_a_tls_registry() {
    let mirror = Server::start(|_| {
        Reply::new(401).header("WWW-Authenticate", "Bearer realm=\"http://tokens.example/t\",service=\"s\"")
    })
    .await;
    let origin = Client::new("registry.example", with_user()).unwrap();
    let options = ClientOptions { scheme: Scheme::Http, timeouts: hasty(), ..ClientOptions::default() };
    let through = origin.mirror(&mirror.host(), options).unwrap();
    let Err(RegistryError::Token { source, .. }) = read(&through).await else { panic!("no token can be had") };
    assert!(matches!(*source, RegistryError::WouldLeak { .. }), "{source}");
}

#[tokio::test]
async fn a_callers_own_proof_is_used_alone_and_its_refusal_is_relayed() {
    let service = Server::start(|_| token("ours")).await;
    let registry = Server::start(guarded(format!("Bearer realm=\"{}\"", service.url("/t")), "Bearer theirs")).await;
    let client = client(&registry.host(), with_user());
    let mut request = BlobRequest::range(0..5);
    request.authorization = Some(HeaderValue::from_static("Bearer wrong"));
    let error = client.blob("a/b", &digest(b"x"), &request).await.unwrap_err();
    let RegistryError::Refused(refusal) = error else { panic!("{error}") };
    assert_eq!((refusal.status.as_u16(), refusal.challenges.len()), (401, 1));
    request.authorization = Some(HeaderValue::from_static("Bearer theirs"));
    client.blob("a/b", &digest(b"x"), &request).await.unwrap();
    assert_eq!((service.seen().len(), registry.seen().len()), (0, 2));
}

#[tokio::test]
async fn a_new_credential_replaces_what_was_learned_with_the_old_one() {
    let registry = Server::start(guarded("Basic".into(), BASIC)).await;
    let client = registry.client();
    assert_eq!(read(&client).await.unwrap_err().status().unwrap(), 401);
    client.set_credential(user());
    read(&client).await.unwrap();
}
