//! The actions of the tied table.

use super::Worker;
use super::faults::flip;
use super::messages::link;
use crate::clock::TimeKind;
use crate::comm::{Content, Header, Reduction};
use crate::control::Report;
use crate::delay::version;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::inject::Fault;
use crate::model;
use crate::number::Number;
use crate::optim::learning_rate;
use crate::params::{Layout, Master};
use crate::schedule::{Action, Pass, Schedule, TableEnd, Tie};
use crate::setup::Setup;
use crate::staleness::{AtUpdate, Meter, Staleness};
use crate::table::Table;
use crate::wire::Wire;

/// The tied table of a rank, and its all-reduce under way.
pub(super) struct TiedTable {
    table: Table,
    reduction: Option<Reduction>,
    /// Where the table's gradient is put together on replica 0, if staleness is measured.
    meter: Option<Meter>,
    /// How old the version is that steps use of this copy: with the newest one, if the embedding
    /// uses it.
    delay: usize,
}

impl TiedTable {
    /// That of a rank, if its stages use one.
    pub(super) fn of_rank(setup: &Setup, rank: usize, emulated: bool) -> Result<Option<TiedTable>> {
        let ends: Vec<TableEnd> = setup
            .grid
            .held(rank)
            .iter()
            .flat_map(|place| setup.schedule.ends(place.stage))
            .collect();
        if ends.is_empty() {
            return Ok(None);
        }

        let (schedule, layout) = (&setup.schedule, Layout::new(&model::table(&setup.dimensions)));
        // On one device with both ends the embedding's is the older one.
        let delay = schedule.table_delay(ends[0]);
        // The optimizer is the same at both ends.
        let optimizer = setup.optimizer(&layout, schedule.table_delay(TableEnd::Input))?;
        let initial = setup.first_weights(&layout)?;
        let held = schedule.tables_held(setup.grid.device_of(rank));
        let older = setup.older_weights(&layout, delay)?;
        let kind = setup.config.precision.kind();
        let joins =
            setup.grid.held(rank).into_iter().find(|place| place.stage == schedule.joiner());
        let waiting =
            joins.map_or(Ok(Vec::new()), |place| setup.waiting_parts(&layout, place.replica))?;

        let mut table =
            Table::new(layout, initial, held, ends, optimizer, kind, setup.master(delay))?;
        if schedule.tie == Tie::Head && setup.master(delay) == Master::Always {
            table = table.unpredicted(TableEnd::Output)?;
        }

        let mut table = table.starting_at(setup.start());
        older
            .iter()
            .try_for_each(|(number, values)| table.versions_mut().recall(*number, values))?;
        waiting.into_iter().for_each(|(step, part)| table.keep(TableEnd::Input, step, part));
        let joiner = joins.filter(|place| place.replica == 0 && !emulated);
        let mut meter = match joiner {
            Some(place) => setup.meter(table.layout(), place.replica)?,
            None => None,
        };
        if let Some(meter) = &mut meter {
            let used = setup.measured_version(meter, setup.start(), delay);
            meter.made(setup.start(), table.flat(), used)?;
        }

        Ok(Some(TiedTable { table, reduction: None, meter, delay }))
    }

    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    pub(super) fn table_mut(&mut self) -> &mut Table {
        &mut self.table
    }

    /// What measures its staleness, if that is done here.
    pub(super) fn meter(&self) -> Option<&Meter> {
        self.meter.as_ref()
    }

    /// What there is to tell of the staleness of the gradient of an update, before it. Under `head`
    /// and `fresh` its parts are of several steps, of no one age.
    fn measure(
        &mut self,
        schedule: &Schedule,
        step: usize,
        sync: usize,
    ) -> Result<Option<Staleness>> {
        let Some((meter, gradient)) = self.meter.as_mut().zip(self.table.gradient()) else {
            return Ok(None);
        };
        let number = version(sync, step, self.delay);
        let aligned = schedule.tie == Tie::Aligned;
        let versions = self.table.versions();
        let used = versions.used(number..number + 1).next().map(|(_, flat)| flat);
        let newest = versions.flat();
        let used = used.filter(|_| aligned);
        meter.before(step, &AtUpdate { version: number, used, newest, gradient })
    }

    /// A version is made.
    fn made(&mut self, setup: &Setup, version: usize) -> Result<()> {
        let Some(meter) = &mut self.meter else { return Ok(()) };
        let used = setup.measured_version(meter, version, self.delay);
        meter.made(version, self.table.flat(), used)
    }
}

impl Worker {
    fn table(&mut self, action: &Action) -> Result<&mut Table> {
        let table = self.table.as_mut().map(TiedTable::table_mut);
        table.ok_or_else(|| Error::Internal(format!("{action} finds no table")))
    }

    /// The step's parts of the table's gradient are complete here: kept on the joiner's device,
    /// else sent there.
    pub(super) fn close_part(&mut self, action: &Action) -> Result<()> {
        let joins = action.stage == self.context.setup.schedule.joiner();
        for end in self.context.setup.schedule.ends(action.stage) {
            let part = self.table(action)?.close(end)?;
            let header = self.table_header(Content::Part, action)?;
            match &mut self.place(action).ends.twin {
                Some(twin) if !joins => twin.send(header, part)?,
                _ => self.table(action)?.keep(end, action.step, part),
            }
        }

        Ok(())
    }

    fn table_header(&mut self, content: Content, action: &Action) -> Result<Header> {
        let shape = [1, 1, self.table(action)?.layout().len as i64];
        Ok(Header {
            content,
            pass: Pass::Train,
            step: action.step,
            microbatch: 0,
            shape,
            wire: Wire::F32,
            payload_elsewhere: false,
        })
    }

    pub(super) fn receive_part(&mut self, action: &Action) -> Result<()> {
        let header = self.table_header(Content::Part, action)?;
        let other = if action.stage == 0 { TableEnd::Output } else { TableEnd::Input };
        if let Some(twin) = &mut self.place(action).ends.twin {
            let part = twin.receive(header)?.f_view([-1])?;
            self.table(action)?.keep(other, action.step, part);
        }

        // Without a twin the other end is on this device, and has closed its part already.
        let here = self.table(action)?.has(other, action.step);
        if here { Ok(()) } else { Err(Error::Internal(format!("{action} finds no part"))) }
    }

    pub(super) fn reduce_table(&mut self, action: &Action) -> Result<()> {
        let schedule = &self.context.setup.schedule;
        let last = schedule.joins_all(action.step + 1, self.stop == Some(action.step + 1));
        // The next segment's forwards begin only after this one's updates of the table.
        let sync = self.places[self.context.slot(action)].sync;
        let inputs = schedule.table_inputs(action.step, sync, last);

        let whole = self.table(action)?.join(action.step, inputs)?;
        let group = &mut self.places[self.context.slot(action)].ends.group;
        if let (Some(group), Some(table)) = (group, &mut self.table) {
            table.reduction = Some(group.all_reduce(action.step, whole)?);
        }

        Ok(())
    }

    fn wait_for_table(&mut self) -> Result<()> {
        let reduction = self.table.as_mut().and_then(|table| table.reduction.take());
        let result = reduction.map_or(Ok(()), Reduction::wait);
        self.probes.waited(TimeKind::Table)?; // The wait is the table's, but no work of the action.
        result
    }

    pub(super) fn send_table(&mut self, action: &Action) -> Result<()> {
        self.wait_for_table()?;
        let header = self.table_header(Content::Sum, action)?;
        let sum = self.table(action)?.sum()?;
        link(&mut self.place(action).ends.twin, action)?.send(header, sum)
    }

    pub(super) fn receive_table(&mut self, action: &Action) -> Result<()> {
        let header = self.table_header(Content::Sum, action)?;
        let sum = link(&mut self.place(action).ends.twin, action)?.receive(header)?.f_view([-1])?;
        self.table(action)?.set_sum(sum);
        Ok(())
    }

    /// `V[t+1] = V[t] + optimizer(mean of the parts' sum over microbatches and replicas)`.
    pub(super) fn update_table(&mut self, action: &Action) -> Result<()> {
        self.wait_for_table()?;
        let setup = &self.context.setup;
        let (config, readback) = (&setup.config, setup.readback);
        let mean = self.context.mean() * setup.tie_factor();
        let lr = learning_rate(&config.optimizer, action.step, config.steps);
        let skips = self.context.skips();
        let delay = self.table.as_ref().map_or(0, |table| table.delay);
        let horizon = setup.horizon(delay, action.step);
        self.measure_table(action)?;
        let norm = self.table(action)?.update(lr, horizon, mean, readback)?;
        if let Some(table) = &mut self.table {
            table.made(&self.context.setup, action.step + 1)?;
        }

        let place = self.place(action).place;
        let wrong = move |step| {
            let tensor = "gradient of the tied embedding".to_owned();
            Error::NotFinite { tensor, step, place, data: String::new() }
        };

        if let Number::Known(norm) = norm
            && !norm.is_finite()
            && !skips
        {
            return Err(wrong(action.step));
        }

        if self.context.faults.hit(Fault::AlterTable, action) {
            self.table(action)?.versions_mut().alter(flip)?;
        }

        let (setup, step) = (&self.context.setup, action.step + 1);
        let copies = setup.grid.replicas > 1 || setup.grid.twin(place).is_some();
        // At a sync point of a line the copies are compared anyway.
        if copies && setup.verifies_at(step) && !setup.schedule.sync.contains(step) {
            self.digest(&Action { step, ..*action })?;
        }

        if place != (Place { stage: self.context.setup.schedule.joiner(), replica: 0 }) {
            return Ok(());
        }

        let step = action.step;
        self.deferred.defer(step, norm, move |norm| match norm.is_finite() || skips {
            true => Ok(Some(Report::TableNorm { step, norm })),
            false => Err(wrong(step)),
        })
    }

    /// Tells what is measured of the table's gradient.
    fn measure_table(&mut self, action: &Action) -> Result<()> {
        let Worker { context, places, table, .. } = self;
        let sync = places[context.slot(action)].sync;
        let Some(table) = table else { return Ok(()) };
        let step = action.step;
        match table.measure(&context.setup.schedule, step, sync)? {
            Some(measured) => {
                context.reports.send(Report::Staleness { stage: None, step, measured })
            }
            None => Ok(()),
        }
    }

    pub(super) fn await_table(&mut self, action: &Action) -> Result<()> {
        let newest = self.table(action)?.newest();
        if newest > action.step {
            Ok(())
        } else {
            Err(Error::Internal(format!("{action} finds version {newest}")))
        }
    }

    pub(super) fn digest(&mut self, action: &Action) -> Result<()> {
        let (place, digest) = (self.place(action).place, self.table(action)?.digest()?);
        self.context.reports.send(Report::TableDigest { place, step: action.step, digest })
    }
}
