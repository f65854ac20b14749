//! kubelet's image service, passed on to containerd unchanged, for the credentials that pass by.
//!
//! kubelet (`--image-service-endpoint`) and crictl are pointed at our socket; of every pull the image and its credential are
//! taken down. Only the fields that matter are named here, with the numbers of the published CRI; everything goes on as the
//! bytes that came.

use std::convert::Infallible;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nydus_backend::registry::Reference;
use prost::Message;
use tonic::body::BoxBody;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{Body as _, BoxFuture, Context, Poll, Service};
use tonic::server::NamedService;
use tonic::transport::{Body, Channel, Endpoint, Uri};
use tonic::{Code, Status};

use crate::keychain::Keychain;
use crate::labels::PullSecret;

/// The longest request that is read; a pull is a few kilobytes.
const MAX_REQUEST: usize = 1 << 20;

#[derive(Clone, PartialEq, Message)]
struct PullImage {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<Auth>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct Auth {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

/// The service in one of the versions that CRI has had; they differ in nothing that passes here.
#[derive(Debug, Clone)]
pub struct ImageService<const ALPHA: bool> {
    containerd: Channel,
    keychain: Keychain,
}

impl NamedService for ImageService<false> {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl NamedService for ImageService<true> {
    const NAME: &'static str = "runtime.v1alpha2.ImageService";
}

impl<const ALPHA: bool> ImageService<ALPHA> {
    /// Passes calls on to containerd's `socket`, which is connected to when it is first needed.
    pub fn new(socket: PathBuf, keychain: Keychain) -> Self {
        let connector = tower::service_fn(move |_: Uri| tokio::net::UnixStream::connect(socket.clone()));
        let containerd = Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        Self { containerd, keychain }
    }
}

impl<const ALPHA: bool> Service<Request<Body>> for ImageService<ALPHA> {
    type Response = Response<BoxBody>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (channel, keychain) = (self.containerd.clone(), self.keychain.clone());
        Box::pin(async move { Ok(pass(channel, &keychain, request).await.unwrap_or_else(|status| status.to_http())) })
    }
}

async fn pass(mut channel: Channel, keychain: &Keychain, request: Request<Body>) -> Result<Response<BoxBody>, Status> {
    let (parts, mut body) = request.into_parts();
    let mut bytes = Vec::new();
    while let Some(piece) = body.data().await {
        bytes.extend_from_slice(&piece.map_err(|error| Status::new(Code::Cancelled, error.to_string()))?);
        if bytes.len() > MAX_REQUEST {
            return Err(Status::new(Code::ResourceExhausted, format!("a request of more than {MAX_REQUEST} bytes")));
        }
    }
    if parts.uri.path().ends_with("/PullImage") {
        note(keychain, &bytes);
    }
    let request = Request::from_parts(parts, boxed(Body::from(bytes)));
    let failed = |error: tonic::transport::Error| {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
        let key = "remote.auth.image_service_address";
        Status::new(Code::Unavailable, format!("containerd's image service ({key}) does not answer: {error}{cause}"))
    };
    futures::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(failed)?;
    Ok(channel.call(request).await.map_err(failed)?.map(boxed))
}

fn boxed(body: Body) -> BoxBody {
    body.map_err(|error| Status::from_error(Box::new(error))).boxed_unsync()
}

/// Takes down the credential of a pull.
fn note(keychain: &Keychain, frame: &[u8]) {
    // Five bytes come before a message: whether it is compressed, and its length.
    let Some(([0, ..], message)) = frame.split_at_checked(5) else { return };
    let Ok(PullImage { image: Some(image), auth: Some(auth) }) = PullImage::decode(message) else { return };
    let (Ok(reference), Some(secret)) = (image.image.parse::<Reference>(), secret(auth)) else { return };
    tracing::debug!(image = %reference, "kubelet pulls with a credential of its own");
    keychain.keep(&reference, secret);
}

fn secret(auth: Auth) -> Option<PullSecret> {
    if !auth.username.is_empty() {
        return Some(PullSecret { user: auth.username, secret: auth.password });
    }
    if !auth.auth.is_empty() {
        let text = String::from_utf8(STANDARD.decode(auth.auth.trim()).ok()?).ok()?;
        let (user, password) = text.split_once(':')?;
        return Some(PullSecret { user: user.to_owned(), secret: password.trim_end_matches('\0').to_owned() });
    }
    if !auth.identity_token.is_empty() {
        tracing::warn!("kubelet pulls with an identity token, which nydusd cannot use");
    }
    (!auth.registry_token.is_empty()).then_some(PullSecret { user: String::new(), secret: auth.registry_token })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(auth: Auth) -> Option<PullSecret> {
        let keychain = Keychain::default();
        let image = ImageSpec { image: "r.example/a:1".to_owned() };
        let message = PullImage { image: Some(image), auth: Some(auth) }.encode_to_vec();
        let mut frame = vec![0];
        frame.extend(u32::try_from(message.len()).expect("short").to_be_bytes());
        frame.extend(message);
        note(&keychain, &frame);
        keychain.find(&"r.example/a:2".parse().expect("a reference"))
    }

    #[test]
    fn every_form_of_a_pull_secret_is_taken_down() {
        let kept = |user: &str, secret: &str| Some(PullSecret { user: user.to_owned(), secret: secret.to_owned() });
        let text = str::to_owned;
        let named = Auth { username: text("u"), password: text("p:q"), ..Auth::default() };
        assert_eq!(found(named), kept("u", "p:q"));
        assert_eq!(found(Auth { auth: text("dTpwOnE="), ..Auth::default() }), kept("u", "p:q"));
        assert_eq!(found(Auth { registry_token: text("t"), ..Auth::default() }), kept("", "t"));
        assert_eq!(found(Auth { identity_token: text("t"), ..Auth::default() }), None);
        assert_eq!(found(Auth { auth: text("*"), ..Auth::default() }), None);
        assert_eq!(found(Auth::default()), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(frame in proptest::collection::vec(proptest::num::u8::ANY, 0..80)) {
            note(&Keychain::default(), &frame);
        }
    }
}
