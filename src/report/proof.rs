//! The claim of the method with a run's own numbers: how long its devices were idle, beside what other
//! schedules would make of the same stage times.

use serde::Serialize;
use serde_json::Value;

use crate::clock::StageTimes;
use crate::delay::SyncPoints;
use crate::grid::Placement;
use crate::metrics::{PlaceRecord, Places};
use crate::schedule::{
    Schedule, ScheduleKind, StageCosts, absorbed, simulated, simulations, step_time,
};

/// Actions that are simulated at most, for the time of a schedule's step and in the search for a grid's
/// slack: about a second each, and half a gigabyte.
const SIMULATED: usize = 1 << 23;
const SEARCHED: usize = 1 << 22;

/// Stages, and microbatches, of a run whose file is not damaged.
const MOST: usize = 1 << 12;

/// What a run's times say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Proof {
    /// The mean share of the devices' time that was neither compute, update, copies nor the table.
    pub measured_idle: f64,
    /// Seconds of a step, as the devices' clocks have it.
    pub measured_step_s: f64,
    /// What every schedule makes of the measured stage times; none of grids too large to be simulated.
    pub schedules: Vec<Ideal>,
    /// Of every device, that of the slowest replica: seconds of work a step, and how late it may be once
    /// without the run's end being later; none for large grids.
    pub work_s: Vec<f64>,
    pub absorbs_s: Option<Vec<f64>>,
    /// The most that is looked for: who absorbs it may absorb more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub absorbs_most_s: Option<f64>,
}

/// A schedule in its steady state.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ideal {
    pub schedule: ScheduleKind,
    pub step_s: f64,
    pub idle: f64,
}

/// The proof of a run; none if its times, or what it is, are not known.
pub fn proof(places: &Places, facts: &Value) -> Option<Proof> {
    let number = |key: &str| facts[key].as_u64().map(|number| number as usize);
    let (stages, microbatches) = (number("stages")?, number("microbatches")?);
    let delays: Vec<usize> = serde_json::from_value(facts["delays"].clone()).ok()?;
    let ahead: Vec<usize> = serde_json::from_value(facts["ahead"].clone()).ok()?;
    let kind: ScheduleKind = serde_json::from_value(facts["schedule"].clone()).ok()?;
    let bounded = |count: usize| (1..=MOST).contains(&count);
    if !bounded(stages) || !bounded(microbatches) || delays.len() != stages || ahead.len() != stages
    {
        return None;
    }

    let of_stages = |of: fn(&[StageCosts]) -> Option<StageCosts>| {
        (0..stages).map(|stage| of(&costs(places, stage))).collect::<Option<Vec<StageCosts>>>()
    };
    let (means, slowest) = (of_stages(mean)?, of_stages(slowest)?);
    let ring = facts["ring"].as_bool().unwrap_or(false);
    let of = |of: ScheduleKind| {
        let mut schedule = Schedule::new(of, stages, microbatches, 1, SyncPoints::ends(1));
        schedule.placement = if ring { Placement::Ring } else { Placement::Line };
        if of == kind {
            (schedule.delays, schedule.ahead) = (delays.clone(), ahead.clone());
        }
        schedule
    };

    let devices = of(kind).grid(1).devices();
    let busy: f64 = work(&means, &of(kind), devices).iter().sum();
    let ideal = |kind: ScheduleKind| {
        let step_s = step_time(&of(kind), means.clone(), 0.0).ok()?;
        let idle = 1.0 - busy / (devices as f64 * step_s);
        // Sums of many times are rounded.
        Some(Ideal { schedule: kind, step_s, idle: if idle > 1e-9 { idle } else { 0.0 } })
    };
    let kinds = [ScheduleKind::Decoupled, ScheduleKind::OneForwardOneBackward, ScheduleKind::Gpipe];
    let (measured_idle, measured_step_s) = measured(places)?;
    let actions = |kind: ScheduleKind| simulated(&of(kind));
    let small = kinds.iter().all(|kind| actions(*kind) <= SIMULATED);
    let search = actions(kind).saturating_mul(simulations(&of(kind)));
    let (absorbs_s, absorbs_most_s) = match search <= SEARCHED {
        true => absorbed(&of(kind), &slowest, 0.0).ok().unzip(),
        false => (None, None),
    };
    Some(Proof {
        measured_idle,
        measured_step_s,
        schedules: kinds.into_iter().filter(|_| small).map(ideal).collect::<Option<_>>()?,
        work_s: work(&slowest, &of(kind), devices),
        absorbs_s,
        absorbs_most_s,
    })
}

/// The times of a microbatch and an update of a stage, of each of its replicas.
fn costs(places: &Places, stage: usize) -> Vec<StageCosts> {
    let of_stage = |times: &&StageTimes| times.stage == stage && times.microbatches > 0;
    let found = places.places.values().flat_map(|place| &place.total.stages).filter(of_stage);
    let of = |times: &StageTimes| {
        let (microbatches, updates) = (times.microbatches as f64, times.updates.max(1) as f64);
        StageCosts {
            forward: (times.forward + times.copies) / microbatches,
            backward: times.backward / microbatches,
            update: (times.update + times.table) / updates,
        }
    };
    found.map(of).collect()
}

/// The means of replicas.
fn mean(replicas: &[StageCosts]) -> Option<StageCosts> {
    let of =
        |of: fn(&StageCosts) -> f64| replicas.iter().map(of).sum::<f64>() / replicas.len() as f64;
    (!replicas.is_empty()).then(|| StageCosts {
        forward: of(|costs| costs.forward),
        backward: of(|costs| costs.backward),
        update: of(|costs| costs.update),
    })
}

/// The replica whose microbatches take longest: the others wait for it.
fn slowest(replicas: &[StageCosts]) -> Option<StageCosts> {
    let time = |costs: &StageCosts| costs.forward + costs.backward;
    replicas.iter().max_by(|a, b| time(a).total_cmp(&time(b))).cloned()
}

/// Seconds of work a step of every device.
fn work(costs: &[StageCosts], schedule: &Schedule, devices: usize) -> Vec<f64> {
    let grid = schedule.grid(1);
    let mut work = vec![0.0; devices];
    for (stage, costs) in costs.iter().enumerate() {
        let microbatches = schedule.microbatches as f64;
        work[grid.device(stage)] += microbatches * (costs.forward + costs.backward) + costs.update;
    }
    work
}

/// The share of time that was a wait, and the time of a step.
fn measured(places: &Places) -> Option<(f64, f64)> {
    // Evaluations and saves are no part of the steps.
    let of_steps = |place: &PlaceRecord| {
        let beside = place.total.share("evaluation") + place.total.share("save");
        place.total.seconds * (1.0 - beside)
    };
    let known = || places.places.values().filter(|place| of_steps(place) > 0.0);
    let count = known().count() as f64;
    let waits = ["upstream", "downstream", "reduce", "idle"];
    let seconds =
        |place: &PlaceRecord, kind: &str| place.total.kinds.get(kind).copied().unwrap_or(0.0);
    let of_table = |place: &PlaceRecord| {
        // The kind has both: the work on the tied table, and the waits for its other end.
        let work: f64 = place.total.stages.iter().map(|times| times.table).sum();
        (seconds(place, "table") - work).max(0.0)
    };
    let idle = known().map(|place| {
        let waited: f64 = waits.iter().map(|kind| seconds(place, kind)).sum();
        (waited + of_table(place)) / of_steps(place)
    });
    let steps = known().map(|place| of_steps(place) / place.total.steps.max(1) as f64);
    (count > 0.0).then(|| (idle.sum::<f64>() / count, steps.sum::<f64>() / count))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::metrics::Spent;

    /// Two stages, whose microbatch takes one second forward and two backward, over ten steps of one
    /// microbatch.
    fn places(seconds: f64, kinds: &[(&str, f64)]) -> Places {
        let place = |stage: usize| {
            let times = StageTimes {
                stage,
                forward: 10.0,
                backward: 20.0,
                table: 1.0,
                microbatches: 10,
                updates: 10,
                ..StageTimes::default()
            };
            let total = Spent {
                steps: 10,
                seconds,
                kinds: kinds.iter().map(|(kind, time)| ((*kind).to_owned(), *time)).collect(),
                stages: vec![times],
            };
            let record = PlaceRecord {
                name: format!("stage {stage}"),
                replica: 0,
                stages: vec![stage],
                step: 10,
                at: 0.0,
                recent: Spent::default(),
                total,
                memory: None,
                peak: None,
                predicted: 0,
            };
            (stage, record)
        };
        Places { updated: 0.0, places: (0..2).map(place).collect() }
    }

    #[test]
    fn idle_time_is_what_nobody_worked_in() {
        let facts = json!({
            "stages": 2, "microbatches": 1, "delays": [1, 0], "ahead": [1, 0], "schedule": "decoupled", "ring": false
        });
        // Of 40 seconds 30 are compute, 4 a wait; 3 of the table, of which one is work. Ten more are no
        // part of the steps.
        let kinds = [
            ("compute", 30.0),
            ("upstream", 4.0),
            ("table", 3.0),
            ("update", 3.0),
            ("evaluation", 8.0),
            ("save", 2.0),
        ];
        let found = proof(&places(50.0, &kinds), &facts).unwrap();
        assert!((found.measured_idle - 0.15).abs() < 1e-12, "{found:?}");
        assert_eq!(found.measured_step_s, 4.0);
        assert_eq!(found.work_s, [3.1, 3.1]);

        let ideal = |kind: ScheduleKind| {
            found.schedules.iter().find(|ideal| ideal.schedule == kind).unwrap()
        };
        assert!(ideal(ScheduleKind::Decoupled).idle < 0.001, "{found:?}");
        let gpipe = ideal(ScheduleKind::Gpipe);
        assert!((gpipe.idle - 0.5).abs() < 0.02 && gpipe.step_s > 6.0, "{found:?}");
        assert!(proof(&places(50.0, &kinds), &Value::Null).is_none());
        assert!(proof(&Places::default(), &facts).is_none());

        // A grid so large that nobody waits for it to be simulated.
        let large = json!({
            "stages": 2, "microbatches": 1 << 12, "delays": [1, 0], "ahead": [usize::MAX, 0], "schedule": "decoupled"
        });
        let found = proof(&places(50.0, &kinds), &large).unwrap();
        assert!(found.schedules.is_empty() && found.absorbs_s.is_none(), "{found:?}");

        // Of a slow replica and a quick one the slow one sets the pace.
        let mut two = places(50.0, &kinds);
        let mut slow = two.places[&0].clone();
        slow.total.stages[0].backward = 40.0;
        two.places.insert(2, slow);
        let found = proof(&two, &facts).unwrap();
        assert_eq!(found.work_s, [5.1, 3.1]);
    }
}
