//! A registry that says what it is told: documents that contradict each other, and blobs that are not there.
//!
//! A real registry checks what is pushed to it, so it cannot be made to lie. This one only reads from a table.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use nydus_rafs::Algorithm;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// By path: the content type and the bytes.
type Answers = Arc<Mutex<HashMap<String, (String, Vec<u8>)>>>;

/// The registry; it ends with the runtime that it was started on.
#[derive(Debug)]
pub struct Liar {
    /// `host:port`, plain HTTP.
    pub host: String,
    answers: Answers,
}

impl Liar {
    /// Starts to listen.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let host = listener.local_addr()?.to_string();
        let answers = Answers::default();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&answers));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { host, answers })
    }

    /// Returns the repository `name`, to which more can be told.
    pub fn repository(&self, name: &str) -> Tale {
        Tale { name: name.to_owned(), answers: Arc::clone(&self.answers) }
    }
}

/// What the registry says of one repository.
#[derive(Debug)]
pub struct Tale {
    name: String,
    answers: Answers,
}

impl Tale {
    /// Returns the repository's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn say(&self, place: &str, media_type: &str, bytes: &[u8]) {
        let path = format!("/v2/{}/{place}", self.name);
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.insert(path, (media_type.to_owned(), bytes.to_vec()));
    }

    /// Holds a blob; returns its descriptor.
    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let descriptor = descriptor(media_type, bytes);
        self.say(&format!("blobs/{}", text(&descriptor["digest"])), "application/octet-stream", bytes);
        descriptor
    }

    /// Answers for the digest of `descriptor` with other bytes.
    pub fn blob_as(&self, descriptor: &Value, bytes: &[u8]) {
        self.say(&format!("blobs/{}", text(&descriptor["digest"])), "application/octet-stream", bytes);
    }

    /// Holds a manifest or index; returns its descriptor.
    pub fn document(&self, media_type: &str, document: &Value) -> Value {
        let bytes = document.to_string();
        let descriptor = descriptor(media_type, bytes.as_bytes());
        self.say(&format!("manifests/{}", text(&descriptor["digest"])), media_type, bytes.as_bytes());
        descriptor
    }

    /// Answers for a tag or digest with a document, whatever digest it has.
    pub fn document_as(&self, target: &str, media_type: &str, document: &Value) {
        self.document(media_type, document);
        self.say(&format!("manifests/{target}"), media_type, document.to_string().as_bytes());
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Returns a true descriptor of `bytes`.
pub fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    let digest = format!("sha256:{}", Algorithm::Sha256.digest(bytes));
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}

async fn answer(State(answers): State<Answers>, request: Request) -> Response {
    let path = request.uri().path();
    if path == "/v2/" {
        return StatusCode::OK.into_response();
    }
    let answer = answers.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned();
    let Some((media_type, bytes)) = answer else { return StatusCode::NOT_FOUND.into_response() };
    let Ok(kind) = HeaderValue::try_from(media_type) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let digest = format!("sha256:{}", Algorithm::Sha256.digest(&bytes));
    let mut response = bytes.into_response();
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response.headers_mut().insert("docker-content-digest", HeaderValue::try_from(digest).expect("hexadecimal digits"));
    response
}
