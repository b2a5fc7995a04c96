//! Before a run: every link sends and every group reduces, with times; what is slow, or stands
//! still, is named.
//!
//! A place first answers its upstream neighbour, then asks its downstream neighbour, so the test
//! runs down the pipeline; then every group makes all-reduces. What arrives is looked at: a link
//! that alters values is no link.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::comm::{Content, Endpoints, Header, Link, Ports, ReplicaGroup};
use crate::error::{Error, Result};
use crate::grid::{Grid, Place};
use crate::params::{slice, to_host};
use crate::schedule::Pass;
use crate::topology::Topology;
use crate::wire::Wire;

/// Round trips that the latency is the least half of.
const PINGS: usize = 8;
/// Values of the large message: 4 MiB.
pub const LARGE: i64 = 1 << 20;
/// All-reduces, of which the fastest counts.
const REDUCTIONS: usize = 3;
/// A link is slow below this share of what its topology says, or of what such links do here.
const SHARE: f64 = 0.5;
/// A latency is long above so many times what the topology says.
const LONG: f64 = 5.0;

/// What was measured: a link from its upper end, or a group from one of its members.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Ranks at both ends of a link; the members of a group.
    pub ranks: Vec<usize>,
    pub group: bool,
    pub latency_us: f64,
    /// Of a group: what an all-reduce moves per member, 2 (R-1)/R of the bytes, over its time.
    pub gbit_s: f64,
}

/// Tests everything that a rank talks through; gives the ports back.
///
/// # Errors
/// A link that alters or loses messages, or one that says nothing for as long as `limit`.
pub fn test(
    ports: Ports,
    grid: Grid,
    rank: usize,
    device: Device,
    limit: Duration,
) -> Result<(Ports, Vec<Measured>)> {
    let doing = Arc::new(Mutex::new(String::new()));
    let (sender, receiver) = channel();
    let told = Arc::clone(&doing);
    let body = move || {
        let mut ports = ports;
        let result = all(&mut ports, grid, rank, device, &told);
        let _ = sender.send((ports, result)); // Nobody waits any more if it took too long.
    };

    std::thread::Builder::new()
        .name("self-test".into())
        .spawn(body)
        .map_err(|error| Error::Internal(format!("no thread for the self-test ({error})")))?;
    match receiver.recv_timeout(limit) {
        Ok((ports, result)) => result.map(|measured| (ports, measured)),
        Err(RecvTimeoutError::Timeout) => {
            let what = doing.lock().map(|text| text.clone()).unwrap_or_default();
            let what = format!("does not get through the self-test: {what}");
            Err(Error::Hang { seconds: limit.as_secs_f64(), place: grid.name(rank), what })
        }
        Err(RecvTimeoutError::Disconnected) => {
            Err(Error::Internal("a panic in the self-test".into()))
        }
    }
}

fn all(
    ports: &mut Ports,
    grid: Grid,
    rank: usize,
    device: Device,
    doing: &Mutex<String>,
) -> Result<Vec<Measured>> {
    let say = |text: String| {
        if let Ok(mut doing) = doing.lock() {
            *doing = text;
        }
    };

    let mut measured = Vec::new();
    for (place, ends) in grid.held(rank).into_iter().zip(&mut ports.places) {
        if let (Some(link), Some(peer)) = (&mut ends.upstream, grid.upstream(place)) {
            say(format!("waits for {peer}"));
            answer(link.as_mut(), place, device)?;
        }

        if let (Some(link), Some(peer)) = (&mut ends.downstream, grid.downstream(place)) {
            say(format!("waits for {peer}"));
            let (latency_us, gbit_s) = ask(link.as_mut(), peer, device)?;
            measured.push(Measured {
                ranks: vec![rank, grid.rank(peer)],
                group: false,
                latency_us,
                gbit_s,
            });
        }
    }

    for (place, ends) in grid.held(rank).into_iter().zip(&mut ports.places) {
        say(format!("waits for the replicas of stage {}", place.stage));
        if let Some((latency_us, gbit_s)) = reduce(ends, grid, place, device)?
            && place.replica == 0
        {
            let ranks = grid.group(place.stage).map(|member| grid.rank(member)).collect();
            measured.push(Measured { ranks, group: true, latency_us, gbit_s });
        }
    }

    Ok(measured)
}

fn header(content: Content, number: usize, values: i64) -> Header {
    let shape = [1, 1, values];
    Header {
        content,
        pass: Pass::Train,
        step: 0,
        microbatch: number,
        shape,
        wire: Wire::F32,
        payload_elsewhere: false,
    }
}

fn filled(values: i64, with: f64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_full([1, 1, values], with, (Kind::Float, device))?)
}

/// Waits until a device has made what has been asked of it.
fn settle(flat: &Tensor) -> Result<()> {
    to_host(&flat.f_view([-1])?.f_narrow(0, 0, 1)?).map(drop)
}

/// What the n-th message of the test holds.
fn value(number: usize) -> f64 {
    1.0 + number as f64
}

fn checked(tensor: &Tensor, number: usize, peer: &str) -> Result<()> {
    let flat = to_host(&tensor.f_view([-1])?)?;
    match slice(&flat).iter().find(|found| f64::from(**found) != value(number)) {
        None => Ok(()),
        Some(found) => {
            let (expected, found) = (value(number), *found);
            Err(Error::SelfTest(format!("{peer} has sent {expected}, and {found} has arrived")))
        }
    }
}

fn answer(link: &mut dyn Link, place: Place, device: Device) -> Result<()> {
    for number in 0..PINGS + 2 {
        let values = if number >= PINGS { LARGE } else { 1 };
        let tensor = link.receive(header(Content::Activation, number, values))?;
        checked(&tensor, number, &format!("the upstream neighbour of {place}"))?;
        link.send(header(Content::Gradient, number, 1), filled(1, value(number), device)?)?;
    }
    Ok(())
}

/// Latency in microseconds, and bandwidth.
fn ask(link: &mut dyn Link, peer: Place, device: Device) -> Result<(f64, f64)> {
    let (mut round, mut large) = (f64::INFINITY, f64::INFINITY);
    for number in 0..PINGS + 2 {
        let values = if number >= PINGS { LARGE } else { 1 };
        let tensor = filled(values, value(number), device)?;
        settle(&tensor)?;
        let start = Instant::now();
        link.send(header(Content::Activation, number, values), tensor)?;
        let tensor = link.receive(header(Content::Gradient, number, 1))?;
        settle(&tensor)?;
        let seconds = start.elapsed().as_secs_f64();
        checked(&tensor, number, &peer.to_string())?;
        let least = if values == LARGE { &mut large } else { &mut round };
        *least = least.min(seconds);
    }

    let bits = LARGE as f64 * 32.0;
    Ok((round / 2.0 * 1e6, bits / (large - round / 2.0).max(1e-9) / 1e9))
}

fn reduce(
    ends: &mut Endpoints,
    grid: Grid,
    place: Place,
    device: Device,
) -> Result<Option<(f64, f64)>> {
    let Some(group) = &mut ends.group else { return Ok(None) };
    let replicas = grid.replicas;
    let expected = (replicas * (replicas + 1) / 2) as f32;
    let (mut small, mut large) = (f64::INFINITY, f64::INFINITY);
    for values in [16, LARGE].into_iter().flat_map(|values| [values; REDUCTIONS]) {
        let flat = match group.memory().filter(|memory| memory.numel() as i64 >= values) {
            Some(memory) => memory.f_narrow(0, 0, values)?.f_fill_(value(place.replica))?,
            None => filled(values, value(place.replica), device)?.f_view([-1])?,
        };

        settle(&flat)?;
        let start = Instant::now();
        group.all_reduce(0, flat.shallow_clone())?.wait()?;
        settle(&flat)?;
        let seconds = start.elapsed().as_secs_f64();
        if let Some(found) = slice(&to_host(&flat)?).iter().find(|found| **found != expected) {
            let text = format!(
                "the sum over the replicas of stage {} is {found}, not {expected}",
                place.stage
            );

            return Err(Error::SelfTest(text));
        }

        let least = if values == LARGE { &mut large } else { &mut small };
        *least = least.min(seconds);
    }

    check_halves(group.as_mut(), place, replicas, device)?;
    // The training begins with zeros there.
    if let Some(mut memory) = group.memory() {
        let _ = memory.f_zero_()?;
    }

    let moved = 2.0 * (replicas - 1) as f64 / replicas as f64 * LARGE as f64 * 32.0;
    Ok(Some((small * 1e6, moved / large / 1e9)))
}

/// Whether the halves of a sum, one after the other, bring what it brings: values of which no two
/// are alike.
fn check_halves(
    group: &mut dyn ReplicaGroup,
    place: Place,
    replicas: usize,
    device: Device,
) -> Result<()> {
    let values = Tensor::f_arange(LARGE, (Kind::Float, device))?
        .f_add_scalar(0.25 + place.replica as f64)?;
    let owned = group.owned(LARGE as usize);
    // NCCL does not promise the same bits of two sums.
    let same = |found: &Tensor, expected: &Tensor| match device {
        Device::Cpu => found.f_equal(expected),
        _ => found.f_allclose(expected, 1e-2, 0.0, false),
    };

    let shared = group.memory().filter(|memory| memory.numel() as i64 >= LARGE);
    let shared = shared.map(|memory| memory.f_narrow(0, 0, LARGE)).transpose()?;
    for flat in [Some(values.f_zeros_like()?), shared].into_iter().flatten() {
        let mut filled = flat.shallow_clone();
        filled.f_copy_(&values)?;

        let whole = values.f_detach_copy()?;
        group.all_reduce(0, whole.shallow_clone())?.wait()?;
        group.reduce(0, flat.shallow_clone())?.wait()?;
        let part = |of: &Tensor| -> Result<Tensor> {
            to_host(&of.f_narrow(0, owned.start as i64, owned.len() as i64)?)
        };

        let reduced = same(&part(&flat)?, &part(&whole)?)?;
        group.gather(0, flat.shallow_clone())?.wait()?;
        if !reduced || !same(&to_host(&flat)?, &to_host(&whole)?)? {
            let what = if reduced { "gathered" } else { "reduced" };
            let text = format!(
                "halves of a sum over {replicas} replicas of stage {} are {what} wrongly",
                place.stage
            );

            return Err(Error::SelfTest(text));
        }
    }

    Ok(())
}

/// What was measured everywhere as a table; below it the links and groups that are slow.
pub fn report(measured: &[Measured], hosts: &[String], topology: Option<&Topology>) -> String {
    let mut out = format!(
        "self-test: {:<34} {:<26} {:>11} {:>9}\n",
        "ranks", "hosts", "latency, us", "Gbit/s"
    );

    let mut notes = String::new();
    for one in measured {
        let ranks: Vec<String> = one.ranks.iter().map(ToString::to_string).collect();
        let what = if one.group {
            format!("group {}", ranks.join(" "))
        } else {
            format!("link {}", ranks.join(" -> "))
        };

        let mut on: Vec<&str> = one.ranks.iter().map(|rank| hosts[*rank].as_str()).collect();
        on.dedup();
        let on = on.join(", ");
        out.push_str(&format!(
            "           {what:<34} {on:<26} {:>11.0} {:>9.2}\n",
            one.latency_us, one.gbit_s
        ));

        if let Some(why) = slow(one, measured, hosts, topology) {
            notes.push_str(&format!("note: {what} on {on} is slow: {why}\n"));
        }
    }
    out + &notes
}

fn slow(
    one: &Measured,
    all: &[Measured],
    hosts: &[String],
    topology: Option<&Topology>,
) -> Option<String> {
    let pairs =
        |one: &Measured| one.ranks.windows(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>();
    if let Some(topology) = topology {
        // A group is as fast as the slowest way between its members.
        let speeds: Vec<_> = pairs(one).into_iter().map(|(a, b)| topology.speed(a, b)).collect();
        let gbit_s = speeds.iter().map(|speed| speed.gbit_s).fold(f64::INFINITY, f64::min);
        let latency = speeds.iter().map(|speed| speed.latency_us).fold(0.0, f64::max);
        if one.gbit_s < SHARE * gbit_s {
            return Some(format!("{:.2} Gbit/s, and the topology says {gbit_s}", one.gbit_s));
        }

        return (!one.group && one.latency_us > LONG * latency)
            .then(|| format!("{:.0} us, and the topology says {latency}", one.latency_us));
    }

    let far = |one: &Measured| one.ranks.iter().any(|rank| hosts[*rank] != hosts[one.ranks[0]]);
    let mut like: Vec<f64> = all
        .iter()
        .filter(|other| (other.group, far(other)) == (one.group, far(one)))
        .map(|o| o.gbit_s)
        .collect();
    like.sort_by(f64::total_cmp);
    let usual = like[like.len() / 2];
    (one.gbit_s < SHARE * usual)
        .then(|| format!("{:.2} Gbit/s, and others like it {usual:.2}", one.gbit_s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local;

    #[test]
    fn links_and_groups_are_measured_and_slow_ones_named() {
        let grid = Grid::line(3, 2);
        let (reports, _received) = channel();
        let (ports, _controls) = local::connect(grid, 4, Wire::F32, 0, &reports);
        let threads: Vec<_> = ports
            .into_iter()
            .enumerate()
            .map(|(rank, ports)| {
                std::thread::spawn(move || {
                    test(ports, grid, rank, Device::Cpu, Duration::from_secs(20))
                })
            })
            .collect();
        let measured: Vec<Measured> =
            threads.into_iter().flat_map(|thread| thread.join().unwrap().unwrap().1).collect();
        let ranks: Vec<Vec<usize>> = measured.iter().map(|one| one.ranks.clone()).collect();
        assert_eq!(
            ranks,
            [vec![0, 1], vec![0, 3], vec![1, 2], vec![1, 4], vec![2, 5], vec![3, 4], vec![4, 5]]
        );
        assert!(
            measured.iter().all(|one| one.gbit_s > 0.0 && one.latency_us > 0.0),
            "{measured:?}"
        );
        let link = |ranks: [usize; 2], gbit_s| Measured {
            ranks: ranks.to_vec(),
            group: false,
            latency_us: 9.0,
            gbit_s,
        };
        let all = [link([0, 1], 9.0), link([1, 2], 2.0), link([3, 4], 9.5), link([4, 5], 9.1)];
        let hosts: Vec<String> = (0..6).map(|_| "a".to_owned()).collect();
        let text = report(&all, &hosts, None);
        assert_eq!(text.lines().filter(|line| line.contains("is slow")).count(), 1, "{text}");
        assert!(
            text.contains("note: link 1 -> 2 on a is slow: 2.00 Gbit/s, and others like it 9.10"),
            "{text}"
        );
    }

    #[test]
    fn a_silent_neighbour_is_named() {
        let grid = Grid::line(2, 1);
        let (reports, _received) = channel();
        let (mut ports, _controls) = local::connect(grid, 4, Wire::F32, 0, &reports);
        let _silent = ports.pop();
        let error = test(ports.remove(0), grid, 0, Device::Cpu, Duration::from_millis(200))
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(
                "stage 0, replica 0 does not get through the self-test: waits for stage 1"
            ),
            "{error}"
        );
    }
}
