//! Nodes on loopback, with an ear that answers what it was asked.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use tempfile::TempDir;

use super::peer::Peer;
use super::*;

/// Answers an ask with the ask itself and who sent it, in two parts.
#[derive(Default)]
struct Echo {
    heard: Mutex<Vec<(Peer, Vec<u8>)>>,
}

impl Ear for Echo {
    fn asked(&self, from: Peer, ask: &[u8]) -> Result<Parts, String> {
        if ask == b"nonsense" {
            return Err("that is no ask".into());
        }
        let (sender, parts) = tokio::sync::mpsc::channel(4);
        let broken = ask == b"break off";
        sender.try_send(Ok(Bytes::copy_from_slice(ask))).unwrap();
        sender.try_send(if broken { Err(BrokenOff) } else { Ok(Bytes::copy_from_slice(&from.0)) }).unwrap();
        Ok(parts)
    }

    fn reported(&self, _: Peer, _: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn gossiped(&self, from: Peer, text: &[u8]) {
        self.heard.lock().unwrap().push((from, text.to_vec()));
    }
}

/// A node's folder, to be started in again.
struct Place {
    dir: TempDir,
    config: Config,
}

impl Place {
    fn new(key: u8, seeds: &[&Node]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster_key_file = dir.path().join("key");
        std::fs::write(&cluster_key_file, hex::encode([key; 32])).unwrap();
        std::fs::set_permissions(&cluster_key_file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let seeds = seeds.iter().map(|seed| seed.own().address.to_string()).collect();
        let config = Config { listen, gossip_listen: listen, cluster_key_file, seeds, ..Config::default() };
        Self { dir, config }
    }

    async fn start(&self) -> Node {
        self.start_with(Arc::default()).await
    }

    async fn start_with(&self, echo: Arc<Echo>) -> Node {
        Bound::bind(self.config.clone(), self.dir.path()).await.unwrap().start(echo).unwrap()
    }
}

impl Node {
    fn own(&self) -> Member {
        let me = self.identity.peer();
        self.table().iter().find(|member| member.peer() == me).unwrap().clone()
    }

    async fn until(&self, what: impl Fn(&Table) -> bool) {
        let mut watch = self.watch();
        let waiting = watch.wait_for(|table| what(table));
        tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("in time").unwrap();
    }
}

fn ready(count: usize) -> impl Fn(&Table) -> bool {
    move |table| table.iter().filter(|member| member.standing == Standing::Ready).count() == count
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_find_each_other_through_one_seed_and_answer_each_other() {
    let first = Place::new(7, &[]).start().await;
    first.until(ready(1)).await;
    let (second, third) = (Place::new(7, &[&first]).start().await, Place::new(7, &[&first]).start().await);
    for node in [&first, &second, &third] {
        node.until(ready(3)).await;
    }
    let to = third.own();
    let whole = async |ask: &'static [u8]| {
        let mut answer = second.ask(&to, Bytes::from_static(ask)).await?;
        answer.whole(1000).await
    };
    for _ in 0..3 {
        let answer = whole(b"what have you").await.unwrap();
        assert_eq!(answer, [&b"what have you"[..], &second.identity.peer().0].concat());
    }
    assert!(whole(b"nonsense").await.unwrap_err().to_string().contains("that is no ask"));
    assert!(whole(b"break off").await.is_err(), "a broken off answer is not a short one");
    assert!(whole(b"and again").await.is_ok());
    // Whoever lives at the address now is not who was meant.
    let other = Member::new(first.identity.peer(), to.address, "", 1, 1);
    let refused = second.ask(&other, Bytes::new()).await.unwrap_err().to_string();
    assert!(refused.contains(&first.identity.peer().to_string()), "{refused}");

    let gone = third.identity.peer();
    third.leave().await;
    first.until(|table| table.iter().all(|member| member.peer() != gone)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_says_to_everybody_is_heard_by_all_members_and_by_nobody_else() {
    let ears: [Arc<Echo>; 4] = Default::default();
    let place = Place::new(7, &[]);
    let first = place.start_with(ears[0].clone()).await;
    first.until(ready(1)).await;
    let second = Place::new(7, &[&first]).start_with(ears[1].clone()).await;
    let third = Place::new(7, &[&second]).start_with(ears[2].clone()).await;
    // Of another cluster, and told where to find this one.
    let stranger = Place::new(8, &[&first]).start_with(ears[3].clone()).await;
    for node in [&first, &second, &third] {
        node.until(ready(3)).await;
    }
    let heard = |ear: &Echo| ear.heard.lock().unwrap().clone();
    let begin = std::time::Instant::now();
    // What is said before the mesh is there is lost; the next one is not.
    let mut number = 0;
    while !(ears[..2].iter().all(|ear| heard(ear).iter().any(|(from, _)| *from == third.identity.peer()))) {
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", ears.each_ref().map(|ear| heard(ear)));
        number += 1;
        third.gossip(format!("news {number}").into());
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    assert!(heard(&ears[0]).iter().all(|(_, text)| text.starts_with(b"news ")));
    assert!(heard(&ears[3]).is_empty());
    drop(stranger);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_and_a_copied_disk_do_not_get_in() {
    let place = Place::new(7, &[]);
    let first = place.start().await;
    first.until(ready(1)).await;
    let stranger = Place::new(8, &[&first]).start().await;
    let copy = Place::new(7, &[&first]);
    std::fs::copy(place.dir.path().join("identity"), copy.dir.path().join("identity")).unwrap();
    let copied = copy.start().await;
    stranger.until(ready(1)).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(first.table().len(), 1);
    assert_eq!(stranger.table().len(), 1, "it begins a cluster of its own");
    assert_eq!(copied.own().standing, Standing::Joining, "a copy is never ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_reached_at_the_address_that_it_gives_is_never_ready() {
    let first = Place::new(7, &[]).start().await;
    first.until(ready(1)).await;
    let mut place = Place::new(7, &[&first]);
    // Nobody listens there.
    place.config.advertise = Some(SocketAddr::from(([127, 0, 0, 1], 1)));
    let hidden = place.start().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(hidden.own().standing, Standing::Joining);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_is_known_by_its_new_life() {
    let first = Place::new(7, &[]).start().await;
    first.until(ready(1)).await;
    let place = Place::new(7, &[&first]);
    let second = place.start().await;
    first.until(ready(2)).await;
    second.leave().await;
    first.until(ready(1)).await;
    let second = place.start().await;
    first.until(ready(2)).await;
    assert_eq!(second.own().boot, 2);
}
